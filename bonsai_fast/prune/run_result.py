"""Results of a run as plain values: what run.json records and the command prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bonsai_fast.console import Reporter
from bonsai_fast.delivery.model_result import Row, RunResult
from bonsai_fast.report import write_report
from bonsai_fast.runs.directory import Run
from bonsai_fast.runs.mask_files import load_mask

SPEEDS = {
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
}


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


def record_result(run: Run, result: RunResult, reporter: Reporter) -> None:
    """Mark a run as finished and write its report."""
    run.record("finished", result=asdict(result))
    reporter.note(f"report: {write_report(run.path)}")
