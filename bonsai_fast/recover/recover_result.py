"""Result of the command `recover`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bonsai_fast.delivery.model_result import Row, RunResult


@dataclass(frozen=True, kw_only=True, repr=False)
class RecoverResult(RunResult):
    """What recovery of a saved model reports; sparsities are those of the pruned model.

    Attributes:
        parameters_dense: number of parameters of the parent.
        zeros: share of zeros in the decoder's matrices.
        warnings: warnings of the last start.
    """

    parameters_dense: int
    zeros: float
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return "dense and recovered model"

    @property
    def rows(self) -> list[Row]:
        dense, pruned = f"{self.parameters_dense:,}", f"{self.parameters:,}"
        less = f"-{self.sparsity_total:.1%} (decoder -{self.sparsity:.2%})"
        found = [Row("parameters", dense, pruned, less), *super().rows]
        if self.zeros:
            found.append(Row("zeros in the decoder", "", f"{self.zeros:.1%}", ""))
        return found
