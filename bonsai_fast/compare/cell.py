"""Results of one method at one sparsity."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods.allocation import TOLERANCE


@dataclass(frozen=True)
class Cell:
    """Results of one method at one sparsity.

    Attributes:
        method: its name, followed by preset and options if given.
        asked, sparsity: requested and removed fraction of the decoder's parameters.
        parameters: of the whole pruned model.
        perplexity: as pruned, on the common evaluation text; inf where it overflows.
        standard_error: of its mean loss, in nats.
        submodels, tokens: work of the search, as planned.
        seconds: of the search; nan if it was interrupted.
        peak_bytes: memory of the search beside the weights; None where it cannot be measured.
        protocol: how the perplexity was measured.
        tasks: zero-shot results of the final model, if requested.
        recovered: perplexity after recovery; None without recovery.
        recovery_tokens: read or trained on by all tiers.
        recovery_seconds: of all tiers.
        recovery: the options that it was made with.
    """

    method: str
    asked: float
    sparsity: float
    parameters: int
    perplexity: float
    standard_error: float
    submodels: int
    tokens: int
    seconds: float
    peak_bytes: int | None
    protocol: dict[str, Any]
    tasks: dict[str, dict[str, float]]
    recovered: float | None = None
    recovery_tokens: int = 0
    recovery_seconds: float = 0.0
    recovery: dict[str, Any] = field(default_factory=lambda: {"recover": "none"})

    @property
    def final(self) -> float:
        """Perplexity of what the method ends with."""
        return self.perplexity if self.recovered is None else self.recovered

    @property
    def within_tolerance(self) -> bool:
        """Whether the sparsity differs from the request by at most 0.5 % of it."""
        return abs(self.asked - self.sparsity) <= TOLERANCE * self.asked


def read_cell(path: Path, evaluation: Sequences, recovery: dict[str, Any]) -> Cell | None:
    """A finished cell on the same text with the same recovery, or None."""
    if not path.is_file():
        return None
    cell = Cell(**json.loads(path.read_text()))
    is_same = cell.protocol["sha256"] == evaluation.sha256 and cell.recovery == recovery
    return cell if is_same else None
