"""Progress of a call in whole (sub-model, sequence) pairs."""

from __future__ import annotations

from bonsai_fast.scoring.interface import Progress


class PairProgress:
    """Converts finished sub-layers of different pairs into whole pairs.

    Args:
        progress: called with the number of pairs done since the last call; None: no reports.
        total: number of pairs of the call.
        distinct: number of different pairs, which are the ones computed.
    """

    def __init__(self, progress: Progress | None, total: int, distinct: int) -> None:
        self._progress, self._total, self._distinct = progress, total, distinct
        self._done, self._told = 0.0, 0

    def add(self, pairs: float) -> None:
        """Report this many different pairs, or fractions of pairs, as done."""
        self._done += pairs
        self._tell(int(self._done / self._distinct * self._total))

    def finish(self) -> None:
        """Report everything that is left."""
        self._tell(self._total)

    def _tell(self, count: int) -> None:
        if self._progress is not None and count > self._told:
            self._progress(min(count, self._total) - self._told)
        self._told = min(max(self._told, count), self._total)
