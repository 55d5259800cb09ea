"""Patterns of zeros in a weight matrix, and how many weights of each group are zeroed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

UNSTRUCTURED = "unstructured"
DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class Pattern:
    """How many weights of a group are zeroed, and whether the pattern defines the groups.

    Attributes:
        sparsity: fraction of a group that is zeroed, exactly as it was written.
        group: M of N:M: of M neighbours along the input, M - N are zeroed; None if the method
            defines the groups.
    """

    sparsity: Fraction
    group: int | None = None

    @classmethod
    def parse(cls, text: str, sparsity: float | None = None) -> Pattern:
        """Read "unstructured" or "N:M", N of M neighbours kept.

        Args:
            text: the pattern.
            sparsity: requested; for N:M it must be 1 - N/M or None.
        Raises:
            ValueError: the text is neither, or the sparsity contradicts it.
        """
        if text == UNSTRUCTURED:
            return cls(Fraction(str(DEFAULT_SPARSITY if sparsity is None else sparsity)))
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(
                f"pattern: expected unstructured or N:M with 0 < N < M, such as 2:4, got {text!r}"
            )
        kept, group = int(match[1]), int(match[2])
        found = cls(Fraction(group - kept, group), group)
        if sparsity is not None and abs(sparsity - found.sparsity) > 1e-3:
            raise ValueError(
                f"pattern {text} removes {float(found.sparsity):.4g} of the weights: "
                f"leave sparsity out or give that, got {sparsity}"
            )
        return found

    def __str__(self) -> str:
        if self.group is None:
            return f"{UNSTRUCTURED} {float(self.sparsity):.4g}"
        return f"{self.group - self.num_pruned(self.group)}:{self.group}"

    def num_pruned(self, count: int) -> int:
        """How many of `count` weights are zeroed: rounded down, as in Wanda's algorithm 1."""
        return int(self.sparsity * count)
