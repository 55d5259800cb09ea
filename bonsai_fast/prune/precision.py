"""Whether losses in low precision rank sub-models as losses in full precision do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bonsai_fast.config.choices import Precision
from bonsai_fast.console import Reporter
from bonsai_fast.methods import Task
from bonsai_fast.methods.regression import kendall_tau
from bonsai_fast.scoring.scorer import MaskScorer

# below this, low precision is too likely to choose other units
LEAST_TAU = 0.9
# what precisions are compared on
CHECKED_SUBMODELS, CHECKED_SEQUENCES = 12, 2


@dataclass(frozen=True)
class PrecisionCheck:
    """How losses of the same sub-models agree in two precisions.

    Attributes:
        precision: the lower one.
        tau: Kendall's tau of the mean losses; 1 if the order is the same.
        error: root mean square difference of mean losses, nats per token.
        spread: standard deviation of those in full precision.
        submodels: number of sub-models compared.
    """

    precision: Precision
    tau: float
    error: float
    spread: float
    submodels: int

    @property
    def is_sound(self) -> bool:
        """Whether the order is nearly the same: tau is at least LEAST_TAU."""
        return self.tau >= LEAST_TAU

    def __str__(self) -> str:
        return (
            f"precision {self.precision}: Kendall's tau {self.tau:.3f} against full precision on "
            f"{self.submodels} sub-models (error of the losses {self.error:.2g}, their spread "
            f"{self.spread:.2g} nats per token)"
        )


def check_precision(
    scorer: MaskScorer, keep: torch.Tensor, input_ids: torch.Tensor
) -> PrecisionCheck:
    """Score sub-models in the scorer's precision and in full precision.

    Args:
        scorer: with `precision` "int8" or "fp8".
        keep: bool [S, P], S >= 2; sub-models like those that will be scored.
        input_ids: int64 [B, T].
    Raises:
        ValueError: the scorer's precision is full, or there is nothing to rank.
    """
    if scorer.precision == "full":
        raise ValueError("precision: expected a scorer in int8 or fp8, got one in full precision")
    if len(keep) < 2:
        raise ValueError(f"keep masks: expected at least 2 to rank, got {len(keep)}")
    exact = MaskScorer(
        scorer.model, layout=scorer.layout, engine="fused", memory_budget=scorer.memory_budget
    )
    low, high = (each.score(keep, input_ids).double().mean(dim=1) for each in (scorer, exact))
    return PrecisionCheck(
        precision=scorer.precision,
        tau=kendall_tau(low.numpy(), high.numpy()),
        error=float((low - high).square().mean().sqrt()),
        spread=float(high.std()),
        submodels=len(keep),
    )


def report_precision(task: Task[Any], reporter: Reporter) -> None:
    """Note, or warn, whether the requested precision ranks random sub-models as full precision."""
    generator = torch.Generator().manual_seed(task.config.seed)
    share = task.budget / task.layout.num_decoder_parameters
    draw = torch.rand(CHECKED_SUBMODELS, len(task.layout), generator=generator)
    tokens = task.calibration.input_ids[:CHECKED_SEQUENCES]
    with reporter.busy("comparing precisions"):
        found = check_precision(task.scorer, draw >= share, tokens)
    if found.is_sound:
        reporter.note(str(found))
    else:
        reporter.warn(f"{found}: expect worse choices than in full precision")
