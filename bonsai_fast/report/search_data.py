"""What a search measured, read from its ledger: probes, plans, steps, layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from bonsai_fast.report.run_record import GroupRecord, RunRecord

# a cost measured on part of a group is assumed to grow with the square of the share
EXPONENT = 2.0
PROBES, EDGES, CURVES, FINALISTS = "probes", "edges", "curves", "finalists"


@dataclass(frozen=True)
class Estimate:
    """A mean over sequences, and its standard error; nan with a single sequence."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Estimate:
        """From float [B]."""
        values = values.double()
        count = len(values)
        error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(values.mean()), error)


@dataclass(frozen=True)
class Probe:
    """Measured cost of removing a share of one group.

    Attributes:
        group: which group.
        fraction: share of what was left of it that was taken.
        cost: in nats per token: divergence from the parent, or loss where that was measured.
    """

    group: GroupRecord
    fraction: float
    cost: Estimate


@dataclass(frozen=True)
class PlanScore:
    """A complete plan.

    Attributes:
        predicted: costs of the probes, scaled to what it takes from each group and added up.
        measured: its loss, in nats per token.
        best: whether it was the one that the round took.
    """

    predicted: float
    measured: Estimate
    best: bool


def searched_rounds(run: RunRecord) -> list[str]:
    """Rounds that probed groups, in order."""
    return sorted({name.partition("/")[0] for name in run.stages if name.endswith("/" + PROBES)})


def probes(run: RunRecord, round_name: str) -> list[Probe]:
    """The probes of a round; groups removed before have none."""
    stage = run.stages[f"{round_name}/{PROBES}"]
    assert run.layout is not None
    found = []
    # the last ones are missing if the round was interrupted
    for group, keep, values in zip(
        run.layout.groups, stage.keep[1:], stage.values[1:], strict=False
    ):
        fraction = _fraction_gone(group, keep, stage.keep[0])
        if fraction > 0:
            found.append(Probe(group, fraction, Estimate.of(values - stage.values[0])))
    return found


def plans(run: RunRecord, round_name: str) -> list[PlanScore]:
    """Every distinct plan that a round scored on its first text, in that order."""
    probed, base = probes(run, round_name), run.stages[f"{round_name}/{PROBES}"].keep[0]
    taken = run.masks[round_name].keep if round_name in run.masks else None
    seen: dict[bytes, PlanScore] = {}
    for name in (EDGES, CURVES):
        stage = run.stages.get(f"{round_name}/{name}")
        if stage is None:
            continue
        for keep, values in zip(stage.keep, stage.values, strict=True):
            predicted = sum(
                max(probe.cost.value, 0.0)
                * (_fraction_gone(probe.group, keep, base) / probe.fraction) ** EXPONENT
                for probe in probed
            )
            best = taken is not None and bool(torch.equal(keep, taken))
            score = PlanScore(predicted, Estimate.of(values), best)
            seen.setdefault(keep.numpy().tobytes(), score)
    return list(seen.values())


def layer_costs(run: RunRecord) -> list[Estimate]:
    """Loss of the parent without each layer, if the method scored it."""
    stage = run.stages.get("layers")
    return [] if stage is None else [Estimate.of(values) for values in stage.values]


@dataclass(frozen=True)
class Step:
    """Losses of the sub-models that one step of a descent drew, in nats per token."""

    number: int
    lowest: float
    mean: float
    highest: float


def steps(run: RunRecord) -> list[Step]:
    """Steps of a descent; steps without a finite loss are left out."""
    found = []
    for name, stage in run.stages.items():
        if not name.startswith("step-"):
            continue
        losses = stage.values.double().mean(dim=1)
        losses = losses[losses.isfinite()]
        if len(losses):
            low, high = float(losses.min()), float(losses.max())
            found.append(Step(int(name.removeprefix("step-")), low, float(losses.mean()), high))
    return found


def binned(values: np.ndarray, bins: int) -> list[np.ndarray]:
    """Neighbours together: at most so many parts of about equal length; each value alone if few."""
    return np.array_split(values, min(bins, max(1, len(values))))


def _fraction_gone(group: GroupRecord, keep: torch.Tensor, base: torch.Tensor) -> float:
    """Share of what `base` keeps of a group that `keep` lacks."""
    part = slice(group.start, group.stop)
    left = int(base[part].sum())
    return int((base[part] & ~keep[part]).sum()) / left if left else 0.0
