"""Two queues that run whenever they like still give what one would: prefetching waits enough.

The queues of a GPU are played by lists of work that a seeded scheduler runs in any order that their
own order and the awaited points allow.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from bonsai_fast.scoring.fused.operands.prefetch import NoSideStream, prefetched

Work = Callable[[], None]


class Queues:
    """A main and a side queue; points are (queue, how much of its work they follow)."""

    def __init__(self) -> None:
        self.main: list[Work | tuple[str, int]] = []
        self.side: list[Work | tuple[str, int]] = []
        self._target = self.main

    def give(self, work: Work) -> None:
        """What a kernel launch does."""
        self._target.append(work)

    def passed(self) -> tuple[str, int]:
        return "main", len(self.main)

    def run(self, work: Work, after: tuple[str, int]) -> tuple[str, int]:
        self.side.append(after)
        self._target = self.side
        work()
        self._target = self.main
        return "side", len(self.side)

    def wait(self, event: tuple[str, int]) -> None:
        self.main.append(event)

    def play(self, draw: random.Random) -> None:
        """Run everything, in a random order of those that are allowed."""
        queues, done = {"main": self.main, "side": self.side}, {"main": 0, "side": 0}
        # mostly one queue, as far as it goes: races show when one runs far ahead
        bias = draw.choice((0.02, 0.5, 0.98))
        while any(done[name] < len(queue) for name, queue in queues.items()):
            able = [name for name, queue in queues.items() if done[name] < len(queue)]
            able = [name for name in able if self._may_run(queues[name][done[name]], done)]
            assert able, "both queues wait for each other"
            name = able[0] if len(able) == 1 or draw.random() < bias else able[1]
            item = queues[name][done[name]]
            if not isinstance(item, tuple):
                item()
            done[name] += 1

    @staticmethod
    def _may_run(item: Work | tuple[str, int], done: dict[str, int]) -> bool:
        return not isinstance(item, tuple) or done[item[0]] >= item[1]


def run(queues: Queues, count: int, found: list[int], stop: int | None = None) -> None:
    """Jobs write their number into their place in two steps; readers take both halves."""
    places = [[-1, -1], [-1, -1]]

    def job(number: int, place: int) -> None:
        def write(half: int) -> None:
            places[place][half] = number

        for half in range(2):
            queues.give(lambda half=half: write(half))

    jobs = [lambda place, number=number: job(number, place) for number in range(count)]
    for number, place in enumerate(prefetched(jobs, queues)):
        if number == stop:
            break
        for half in range(2):
            queues.give(lambda place=place, half=half: found.append(places[place][half]))
    # what comes next may use the same memory
    queues.give(lambda: places[0].__setitem__(0, 99))
    queues.give(lambda: places[1].__setitem__(1, 99))
    queues.give(lambda: found.extend(place for both in places for place in both if place == 99))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_every_reader_finds_its_own_result(count: int) -> None:
    for seed in range(60):
        queues, found = Queues(), []
        run(queues, count, found)
        queues.play(random.Random(seed))
        expected = [number for number in range(count) for _ in range(2)]
        assert found == [*expected, 99, 99], f"seed {seed}"


def test_the_next_result_is_made_before_the_current_one_is_used() -> None:
    """Otherwise nothing would ever overlap."""
    queues, found = Queues(), []
    run(queues, 3, found)
    first_read = next(n for n, item in enumerate(queues.main) if not isinstance(item, tuple))
    waited = [item[1] for item in queues.main[:first_read] if isinstance(item, tuple)]
    # two marks to wait for and two jobs of two steps each are on the side by then
    assert max(waited) == 3 and len(queues.side) == 9
    assert queues.side[3] == ("main", 0), "the second job waits for no reader"


def test_who_gives_up_leaves_no_work_behind() -> None:
    for seed in range(60):
        queues, found = Queues(), []
        run(queues, 5, found, stop=2)
        queues.play(random.Random(seed))
        assert found == [0, 0, 1, 1, 99, 99], f"seed {seed}"


def test_without_streams_it_is_a_loop() -> None:
    order: list[str] = []
    jobs = [lambda place, n=n: order.append(f"make {n} in {place}") for n in range(3)]
    for number, place in enumerate(prefetched(jobs, NoSideStream())):
        order.append(f"use {number} in {place}")
    assert sorted(order) == sorted(
        f"{verb} {n} in {n % 2}" for verb in ("make", "use") for n in range(3)
    )
    assert order.index("make 2 in 0") > order.index("use 0 in 0")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """A slow reader of one place and quick writers to it."""
    from bonsai_fast.scoring.fused.operands.prefetch import CUDASideStream

    device = torch.device("cuda")
    places = [torch.empty(1 << 22, device=device) for _ in range(2)]
    jobs = [lambda place, n=n: places[place].fill_(n) for n in range(20)]
    sums = []
    for place in prefetched(jobs, CUDASideStream(device)):
        for _ in range(20):
            torch.sort(places[1][:1000])
        sums.append(places[place].sum())
    assert [float(total) / (1 << 22) for total in sums] == list(range(20))
