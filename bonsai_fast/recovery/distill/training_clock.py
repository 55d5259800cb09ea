"""How much of a training is done: of its tokens, or of its time."""

from __future__ import annotations

import time

from bonsai_fast.recovery.distill.processes import Processes


class TrainingClock:
    """Counts the seconds of all starts of a training.

    Args:
        total: sequences to train on.
        minutes: time limit; None: none.
        processes: all of them see the time of the main one, so they stop together.
    """

    def __init__(self, total: int, minutes: float | None, processes: Processes) -> None:
        self.total = total
        self._limit = None if minutes is None else 60 * minutes
        self._processes = processes
        self._earlier, self._start = 0.0, time.perf_counter()

    def resume(self, seconds: float) -> None:
        """Add the seconds of earlier starts."""
        self._earlier = seconds

    @property
    def seconds(self) -> float:
        """Of all starts until now."""
        return self._earlier + time.perf_counter() - self._start

    def share(self, sequences: int) -> float:
        """What is done, in [0, 1], after so many sequences."""
        share = sequences / self.total
        if self._limit is not None:
            share = max(share, self._processes.of_main(self.seconds / self._limit))
        return min(1.0, share)
