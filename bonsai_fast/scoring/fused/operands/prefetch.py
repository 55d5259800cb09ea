"""Making the next thing on a side stream while the current one is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

# a point in a queue's work, of whatever kind the queue has
Event = Any


class SideStream(Protocol):
    """A queue of work beside the one in which everything else runs."""

    def passed(self) -> Event:
        """The point in the main queue that all work given so far leads to."""

    def run(self, work: Callable[[], None], after: Event) -> Event:
        """Queue what `work` does on the side, behind a point of the main queue; its end."""

    def wait(self, event: Event) -> None:
        """Let the main queue's further work begin behind a point of the side queue."""


class CUDASideStream:
    """A stream of CUDA beside the current one of a device."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        self._side = torch.cuda.Stream(device)

    def passed(self) -> Event:
        """See `SideStream`."""
        return self._main.record_event()

    def run(self, work: Callable[[], None], after: Event) -> Event:
        """See `SideStream`. What `work` allocates must not be used by the main stream."""
        self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            work()
        return self._side.record_event()

    def wait(self, event: Event) -> None:
        """See `SideStream`."""
        self._main.wait_event(event)


class NoSideStream:
    """For devices without streams: everything happens at once, in the order of the calls."""

    def passed(self) -> None:
        """See `SideStream`."""

    def run(self, work: Callable[[], None], after: Event) -> None:
        """See `SideStream`."""
        work()

    def wait(self, event: Event) -> None:
        """See `SideStream`."""


def prefetched(jobs: Sequence[Callable[[int], None]], stream: SideStream) -> Iterator[int]:
    """Run jobs on the side, each one step before its result is used.

    There are two places for results. Job n fills place n % 2, behind the use of what job n - 2 left
    there, and beside the use of what job n - 1 left in the other.

    Args:
        jobs: each is given the number of its place.
        stream: where they run. Memory that they write, or read for the last time, must stay until
            the iteration ends: further work of the main queue begins behind all of theirs.
    Yields:
        The place of each job's result, when work that the main queue is given may use it; all such
        work must have been given when the next one is asked for.
    """
    if not jobs:
        return
    start = stream.passed()
    free = [start, start]
    ready = stream.run(partial(jobs[0], 0), start)
    try:
        for number in range(len(jobs)):
            current, place = ready, number % 2
            if number + 1 < len(jobs):
                ready = stream.run(partial(jobs[number + 1], 1 - place), free[1 - place])
            stream.wait(current)
            yield place
            free[place] = stream.passed()
    finally:
        # also where the user gave up between
        stream.wait(ready)
