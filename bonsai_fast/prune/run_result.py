"""Results of a run as plain values: what run.json records and the command prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bonsai_fast.console import Reporter
from bonsai_fast.report import write_report
from bonsai_fast.runs.directory import Run
from bonsai_fast.runs.mask_files import load_mask

SPEEDS = {
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
}


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


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneResult(RunResult):
    """Result of a run that removes units.

    Attributes:
        parameters_dense: number of parameters of the parent.
        latency: speeds of "dense" and "pruned"; empty if the model was streamed.
        submodels_scored, tokens_scored: work of the last start, without what was recorded before.
        rounds: name, sparsity and perplexity after each round but the last.
        peak_bytes: memory of the search beside the weights, in the last start; None where it cannot
            be measured.
        warnings: warnings of the last start.
    """

    parameters_dense: int
    latency: dict[str, dict[str, Any]]
    submodels_scored: int
    tokens_scored: int
    rounds: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def keep_mask(self) -> torch.Tensor:
        """bool [P], the units that were kept, in the order of the run's `Layout`."""
        return load_mask(Path(self.run) / "masks" / "final.safetensors").keep

    @property
    def rows(self) -> list[Row]:
        sizes = Row(
            "parameters",
            f"{self.parameters_dense:,}",
            f"{self.parameters:,}",
            f"-{self.sparsity_total:.1%} (decoder -{self.sparsity:.2%})",
        )
        return [sizes, *super().rows, *self._speeds()]

    @property
    def caption(self) -> str:
        if not self.latency:
            return super().caption
        speed = self.latency["dense"]
        return (
            f"{super().caption}; speeds: batch 1, medians, both models timed alternately, "
            f"{speed['decode_tokens']} tokens after a prompt of {speed['prefill_tokens']}"
        )

    def _speeds(self) -> list[Row]:
        if not self.latency:
            return []
        dense, pruned = self.latency["dense"], self.latency["pruned"]
        return [
            Row(
                label,
                f"{dense[f'{phase}_tokens_per_s']:.1f}",
                f"{pruned[f'{phase}_tokens_per_s']:.1f}",
                f"x{pruned[f'{phase}_speedup']:.2f}",
            )
            for phase, label in SPEEDS.items()
        ]


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseResult(RunResult):
    """Result of a run that zeroes weights; the saved model has its parent's class and shapes.

    Attributes:
        method, pattern: as requested.
        weights: number of weights that were pruned: the linear layers of the decoder.
        zeros, zeros_dense: how many of them are exactly zero in the saved model, read from disk
            again, and in the parent.
        standard_error: of the pruned model's mean loss, nats.
        tokens: calibration tokens of the last start; one counts when all layers have run on it.
        pruning_seconds: wall time of the last start until all weights were found.
    """

    method: str
    pattern: str
    weights: int
    zeros: int
    zeros_dense: int
    standard_error: float
    tokens: int
    pruning_seconds: float

    @property
    def title(self) -> str:
        return f"{super().title}: {self.method}, {self.pattern}"

    @property
    def rows(self) -> list[Row]:
        zeros = Row(
            "zeros",
            f"{self.zeros_dense:,}",
            f"{self.zeros:,}",
            f"{self.sparsity:.2%} of {self.weights:,} weights, "
            f"{self.sparsity_total:.1%} of the model",
        )
        return [zeros, *super().rows]

    @property
    def caption(self) -> str:
        return f"{super().caption}; zeros save memory and time only in engines that support them"


Result = TypeVar("Result", bound=RunResult)


def recorded_result(run: Run, kind: type[Result], reporter: Reporter) -> Result:
    """The result of a run that is finished."""
    reporter.note(f"{run.path} is finished; nothing to do")
    return kind(**json.loads((run.path / run.MANIFEST).read_text())["result"])


def record_result(run: Run, result: RunResult, reporter: Reporter) -> None:
    """Mark a run as finished and write its report."""
    run.record("finished", result=asdict(result))
    reporter.note(f"report: {write_report(run.path)}")
