"""Results as plain values: what run.json records and commands print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from bonsai_fast.console import Reporter
from bonsai_fast.runs.directory import Run


class Row(NamedTuple):
    """One quantity of both models, as text."""

    label: str
    dense: str
    pruned: str
    change: str


@dataclass(frozen=True, kw_only=True, repr=False)
class RunResult:
    """What every run reports.

    Attributes:
        output: directory of the saved model.
        run: directory of the run.
        sparsity: removed fraction of the decoder's parameters, or fraction of zeros in the pruned
            weights.
        sparsity_total: the same number of parameters as a fraction of the whole model.
        parameters: number of parameters of the pruned model, zeros included.
        dense_perplexity, pruned_perplexity: on text that was not used for calibration.
        protocol: how both perplexities were measured.
        tasks: zero-shot results of "dense" and "pruned", if tasks were given.
        max_logit_difference: largest difference between the logits of the pruned model and of the
            saved one, loaded again.
        seconds: wall time of the last start.
        recovery: what recovery did, see `RecoveryResult`; None if there was none.
    """

    output: str
    run: str
    sparsity: float
    sparsity_total: float
    parameters: int
    dense_perplexity: float
    pruned_perplexity: float
    protocol: dict[str, Any]
    tasks: dict[str, dict[str, dict[str, float]]]
    max_logit_difference: float
    seconds: float
    recovery: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """Heading of the comparison."""
        return "dense and pruned model"

    @property
    def rows(self) -> list[Row]:
        """Both models side by side."""
        dense, pruned = self.dense_perplexity, self.pruned_perplexity
        rows = [Row("perplexity", f"{dense:.2f}", f"{pruned:.2f}", f"x{pruned / dense:.2f}")]
        if self.recovery:
            before = self.recovery["perplexity_before"]
            rows.append(Row("before recovery", "", f"{before:.2f}", f"x{before / dense:.2f}"))
        return rows

    @property
    def caption(self) -> str:
        """How the rows were measured."""
        return (
            f"perplexity: {self.protocol['dataset']}, {self.protocol['tokens']:,} predicted "
            f"tokens, window {self.protocol['window']}, stride {self.protocol['stride']}"
        )

    def __repr__(self) -> str:
        rows = [Row("", "dense", "pruned", "change"), *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{row.label:<{widths[0]}}  {row.dense:>{widths[1]}}  {row.pruned:>{widths[2]}}  "
            f"{row.change}"
            for row in rows
        ]
        lines += [self.caption, f"saved in {self.output}"]
        return "\n  ".join([f"{type(self).__name__}: {self.title}", *lines])


Result = TypeVar("Result", bound=RunResult)


def recorded_result(run: Run, kind: type[Result], reporter: Reporter) -> Result:
    """The result of a run that is finished."""
    reporter.note(f"{run.path} is finished; nothing to do")
    return kind(**json.loads((run.path / run.MANIFEST).read_text())["result"])
