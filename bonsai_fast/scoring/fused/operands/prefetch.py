"""Prepare the next item on a side stream while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

# a point in a queue of work; its type depends on the queue
Event = Any


class SideStream(Protocol):
    """A second queue of work, beside the main queue in which everything else runs."""

    def passed(self) -> Event:
        """The current end of the main queue."""

    def run(self, work: Callable[[], None], after: Event) -> Event:
        """Queue work on the side, after a point of the main queue; returns its end."""

    def wait(self, event: Event) -> None:
        """Let further work of the main queue begin after a point of the side queue."""


class CUDASideStream:
    """A second CUDA stream, beside the current one of a device."""

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
    """For devices without streams: work runs when it is queued."""

    def passed(self) -> None:
        """See `SideStream`."""

    def run(self, work: Callable[[], None], after: Event) -> None:
        """See `SideStream`."""
        work()

    def wait(self, event: Event) -> None:
        """See `SideStream`."""


def prefetched(jobs: Sequence[Callable[[int], None]], stream: SideStream) -> Iterator[int]:
    """Run jobs on a side stream, each one step before its result is used.

    There are two places for results. Job n fills place n % 2 after the result of job n - 2 was used
    there, while the result of job n - 1 is used in the other place.

    Args:
        jobs: called with the number of the place to fill.
        stream: where they run. Memory that they read or write must not be freed before the
            iteration ends; the main queue then waits for all jobs.
    Yields:
        The place of each job's result. Queue all work that uses it before the next iteration.
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
        # also if the caller stops early
        stream.wait(ready)
