"""The default where compensation follows: plans are scored with their projections refitted.

Gram matrices of the parent's output projections say in which order each sub-layer's units are
removed best, and at which cost, if the others make up for them (`surgeon_order`). That takes no
sub-model. What it cannot see is scored: what key-value heads and whole sub-layers cost in the end,
how many layers to spare at both ends, and how far the layers' widths should follow their costs.
Every sub-model that is scored has its own output projections (`LocalRefits`), so plans compete at
what they cost after compensation.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from bonsai_fast.methods.allocation import plan_mask
from bonsai_fast.methods.importance.surgeon_prior import (
    RIDGE,
    SurgeonCosts,
    in_strict_order,
    surgeon_costs,
)
from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.bonsai_options import BonsaiOptions
from bonsai_fast.methods.units.proposals import (
    SPARED,
    Proposal,
    best_of,
    is_spared,
    propose,
    texts_of,
)
from bonsai_fast.models.layout import Layout
from bonsai_fast.recovery.closed_form.local_refits import LocalRefits
from bonsai_fast.recovery.closed_form.output_grams import OutputGrams

# there is one round: the orders of removal reach any target
ROUND = "round-01"
# sequences that probes are scored on; their divergence needs little text
PROBE_SEQUENCES = 3
# a probe removes this share of a layer's heads; costs grow as the square of it
PROBED_SHARE = 1 / 3
# shares of the layers that plans spare at the start and at the end
FIRST, LAST = (0.05, 0.1, 0.15), (0.0, 0.05, 0.1)
# 0: all layers get the same width; 1: the next channel costs the same in all layers
MIXES = (0.0, 0.25, 0.75, 1.0)
USUAL_MIX = 0.5
# heads cost this many times what probes of single layers say, since damage adds up
ATTENTION_FACTORS = (4.0, 2.0, 1.0)
FINALISTS = 3
# of the scorer's memory budget, for projections that several plans share
CACHE_SHARE = 8


@dataclass(frozen=True, eq=False)
class _Costs(SurgeonCosts):
    """What removal costs.

    Attributes:
        probed: nats per token that a whole group of heads or a sub-layer costs, by number of the
            group; none for channels.
    """

    probed: dict[int, float]


class CompensatedBonsai:
    """Statistics, probes of attention, and scored plans."""

    def plan(self, task: Task[BonsaiOptions]) -> Plan:
        """One pass for statistics, then probes and plans."""
        first, second = texts_of(task)
        probes = 1 + len(_probed_groups(task.layout))
        plans = 1 + len(FIRST) * len(LAST) + 2 * (len(MIXES) + len(ATTENTION_FACTORS))
        tokens = task.calibration.input_ids.numel() + plans * first.numel()
        tokens += probes * first[:PROBE_SEQUENCES].numel() + FINALISTS * second.numel()
        return Plan(1, probes + plans + FINALISTS, tokens)

    def find(self, search: Search[BonsaiOptions]) -> Tensor:
        """The units to keep, bool [P]; a re-targeted run selects by the recorded relevance."""
        task = search.task
        keep = torch.ones(len(task.layout), dtype=torch.bool)
        if search.recorded_only:
            return propose(search, keep, search.recorded_relevance(), task.budget, "recorded").keep
        grams = OutputGrams(search.run.path / "grams")
        with search.reporter.bar(
            "statistics, layers", total=task.layout.decoder.num_layers
        ) as advance:
            grams.collect(
                task.model,
                task.calibration.input_ids,
                memory_budget=task.config.memory_budget,
                advance=advance,
            )
        best = self._search(search, grams)
        search.record_relevance(best.relevance)
        search.run.save_mask(ROUND, best.keep)
        shutil.rmtree(grams.path, ignore_errors=True)
        return best.keep

    def _search(self, search: Search[BonsaiOptions], grams: OutputGrams) -> Proposal:
        task, layout = search.task, search.task.layout
        first, second = texts_of(task)
        refits = LocalRefits(
            task.model, grams, ridge=RIDGE, cache_bytes=task.scorer.memory_budget // CACHE_SHARE
        )
        costs = _measured_costs(search, grams, refits, first[:PROBE_SEQUENCES].contiguous())
        everything = torch.ones(len(layout), dtype=torch.bool)

        def proposal(
            edges: tuple[float, float], mix: float, error_per_nat: float | None = None
        ) -> Proposal:
            relevance = _relevance(layout, costs, edges, mix, error_per_nat)
            name = f"edges {edges[0]:g} and {edges[1]:g}, mix {mix:g}"
            name += "" if error_per_nat is None else f", a nat of attention {error_per_nat:.3g}"
            return propose(search, everything, relevance, task.budget, name, edges)

        def best(stage: str, plans: list[Proposal], text: Tensor, count: int) -> list[Proposal]:
            return best_of(search, f"{ROUND}/{stage}", plans, text, count, output_weights=refits)

        plain = [proposal(edges, USUAL_MIX) for edges in product(FIRST, LAST)]
        found = best("edges", plain, first, FINALISTS)
        per_nat = _error_per_nat(search, costs, found[0], refits, first)
        others = [
            *(proposal(near.edges, mix) for near in found[:2] for mix in MIXES),
            *(
                proposal(near.edges, USUAL_MIX, per_nat * factor)
                for near in found[:2]
                for factor in ATTENTION_FACTORS
            ),
        ]
        found = best("widths", found + others, first, FINALISTS)
        return best("finalists", found, second, 1)[0]


def _probed_groups(layout: Layout) -> list[int]:
    """Numbers of the groups whose cost is measured by probes: all but channels."""
    return [n for n, group in enumerate(layout.groups) if group.kind != "channel"]


def _measured_costs(
    search: Search[BonsaiOptions], grams: OutputGrams, refits: LocalRefits, input_ids: Tensor
) -> _Costs:
    """The surgeon's orders, which are recorded, and probes of attention and whole sub-layers."""
    layout, model = search.task.layout, search.task.model

    def orders() -> dict[str, Tensor]:
        with search.reporter.bar("orders of removal", total=len(layout.groups)) as advance:
            costs = surgeon_costs(model, layout, grams, advance)
        return {"rank": costs.rank, "added": costs.added}

    found = search.measured("surgeon", orders, search.task.calibration.input_ids.numel())
    probed = _probed_groups(layout)
    counts = torch.zeros(1 + len(probed), len(layout.groups), dtype=torch.int64)
    shares = []
    for row, number in enumerate(probed, start=1):
        size = len(layout.groups[number])
        counts[row, number] = max(1, round(PROBED_SHARE * size))
        shares.append(float(counts[row, number]) / size)
    masks = torch.stack([plan_mask(layout, found["rank"], row) for row in counts])
    damage = search.damage(f"{ROUND}/attention", masks, input_ids, output_weights=refits)
    nats = damage.mean(dim=1, dtype=torch.float64)
    nats = (nats[1:] - nats[0]).nan_to_num(nan=1e6, posinf=1e6).clamp_min(1e-6)
    whole = {
        number: float(cost) / share**2
        for number, cost, share in zip(probed, nats, shares, strict=True)
    }
    return _Costs(found["rank"], found["added"], whole)


def _error_per_nat(
    search: Search[BonsaiOptions],
    costs: _Costs,
    plan: Proposal,
    refits: LocalRefits,
    input_ids: Tensor,
) -> float:
    """Error of the residual stream for each nat that a plan without heads costs."""
    layout = search.task.layout
    masks = torch.stack([torch.ones_like(plan.keep), plan.keep])
    losses = search.losses(f"{ROUND}/scale", masks, input_ids, output_weights=refits)
    dense, pruned = losses.mean(dim=1, dtype=torch.float64).tolist()
    gone = ~plan.keep
    for number in costs.probed:
        group = layout.groups[number]
        gone[group.start : group.stop] = False
    error = float(costs.added[gone].sum())
    return error / max(pruned - dense, 1e-3) if math.isfinite(pruned) else error


def _relevance(
    layout: Layout,
    costs: _Costs,
    edges: tuple[float, float],
    mix: float,
    error_per_nat: float | None,
) -> Tensor:
    """What each unit adds to the error after those before it in its group: float64 [P].

    Args:
        costs: of removal.
        edges: shares of the layers to spare at either end.
        mix: 0: the same in all layers; 1: as measured.
        error_per_nat: makes probes comparable with channels; None: heads are left alone.
    """
    channels = [n for n, group in enumerate(layout.groups) if group.kind == "channel"]
    curves = {n: _above_zero(costs.rising(layout.groups[n]).numpy()) for n in channels}
    steps = np.linspace(0, 1, 101)
    common = np.median(
        [np.interp(steps, np.linspace(0, 1, len(curve)), curve) for curve in curves.values()],
        axis=0,
    )
    relevance = torch.empty(len(layout), dtype=torch.float64)
    for number, group in enumerate(layout.groups):
        size = len(group)
        if number in curves:
            usual = np.interp(np.linspace(0, 1, size), steps, common)
            added = usual ** (1 - mix) * curves[number] ** mix
        else:
            whole = costs.probed[number] * (error_per_nat or 1.0)
            added = whole * np.diff((np.arange(size + 1) / size) ** 2)
            added *= SPARED**2 if error_per_nat is None else 1.0
        if is_spared(group.layer, layout.decoder.num_layers, edges):
            added = added * SPARED
        # no unit is removed before one that comes earlier in the order
        rising = torch.from_numpy(np.maximum.accumulate(added))
        relevance[costs.places(group)] = in_strict_order(rising)
    return relevance


def _above_zero(curve: np.ndarray) -> np.ndarray:
    """A rising curve, so that a power of it can be taken: float64 [units]."""
    return curve.clip(min=max(float(curve[-1]) * 1e-9, 1e-30))
