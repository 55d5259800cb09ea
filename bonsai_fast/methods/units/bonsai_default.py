"""The default: Bonsai with few unknowns, and complete plans that are scored before one is chosen.

The prior decides which units of a group (layer, kind) are removed: its ranks are good inside a
group. Scored sub-models decide how many are removed from each group: each of them thins out one
group, which measures the cost. A curve through these costs gives every unit its relevance. The rest
is Bonsai: global selection by parameter count, in steps.

Costs that were measured one at a time do not add up: damage in several layers compounds, and by how
much depends on where they are. So plans are tried. First, plans that spare more or fewer of the
first and last layers are scored as they would be saved. Then, inside the best of these, the
measured costs get more or less weight. The best plans are compared again on other text.

Probes are judged by their divergence from the parent: on little text, the loss often improves by
chance with small damage. Complete plans are judged by their loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from bonsai_fast.methods.allocation import plan_mask
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
from bonsai_fast.models.layout import ATTENTION, Group, Kind, Layout

# a stage removes at most this fraction of the decoder
STEP = 0.25
# fraction of a group that a probe removes; beyond it, costs are unknown
REACH: dict[Kind, float] = {
    "channel": 0.6,
    "head": 1 / 3,
    "kv-group": 1 / 3,
    "expert": 0.5,
    "attention": 1.0,
    "mlp": 1.0,
}
# fractions of the layers that a plan may spare at either end
EDGES = (0.0, 0.05, 0.1, 0.15)
# curves: costs rise as fraction ** exponent; attention costs this many times the measured value;
# the weight k of measured costs: cost = median^(1 - k) measured^k
EXPONENTS = (1.5, 2.0, 3.0)
ATTENTION_FACTORS = (2.0, 4.0)
TEMPERATURES = (0.25, 0.5)
# a cost below this fraction of its kind's median is noise, and would empty its group
SMALLEST_COST = 0.25
# plans that are compared on other text at the end
FINALISTS = 4


class GroupedBonsai:
    """Several stages up to the target, each with probes and scored plans."""

    def plan(self, task: Task[BonsaiOptions]) -> Plan:
        """Probes, plans and one pass for the prior in every stage."""
        stages = len(_goals(task))
        curves = 2 * len(EXPONENTS) * len(ATTENTION_FACTORS) * len(TEMPERATURES)
        first, second = texts_of(task)
        early = 1 + len(task.layout.groups) + len(EDGES) ** 2 + curves
        tokens = early * first.numel() + FINALISTS * second.numel()
        tokens += task.calibration.input_ids.numel()
        return Plan(stages, stages * (early + FINALISTS), stages * tokens)

    def find(self, search: Search[BonsaiOptions]) -> torch.Tensor:
        """Run the stages; a re-targeted run selects by the relevance that was recorded."""
        task, layout = search.task, search.task.layout
        keep = torch.ones(len(layout), dtype=torch.bool)
        if search.recorded_only:
            relevance = search.recorded_relevance()
            return propose(search, keep, relevance, task.budget, "recorded").keep
        relevance = torch.zeros(len(layout), dtype=torch.float64)
        for number, goal in enumerate(_goals(task), start=1):
            stage = f"round-{number:02d}"
            best = self._stage(search, stage, keep, relevance, goal)
            keep, relevance = best.keep, best.relevance
            search.run.save_mask(stage, keep)
        search.record_relevance(relevance)
        return keep

    def _stage(
        self,
        search: Search[BonsaiOptions],
        stage: str,
        keep: torch.Tensor,
        before: torch.Tensor,
        goal: int,
    ) -> Proposal:
        task, layout = search.task, search.task.layout
        first, second = texts_of(task)
        prior = search.prior(
            task.options.usual_prior(layout), stage, keep, task.calibration.input_ids
        )
        costs = _probe(search, f"{stage}/probes", keep, prior, first)

        def proposal(
            edges: tuple[float, float], exponent: float, attention: float, temperature: float
        ) -> Proposal:
            whole = _whole_costs(layout, costs, edges, exponent, attention, temperature)
            relevance = _relevance(layout, whole, exponent, keep, prior, before)
            name = f"edges {edges[0]:g} and {edges[1]:g}, exponent {exponent:g}"
            name += f", attention x{attention:g}, temperature {temperature:g}"
            return propose(search, keep, relevance, goal, name, edges)

        plain = [proposal((a, z), 2.0, SPARED, 0.0) for a, z in product(EDGES, EDGES)]
        best = best_of(search, f"{stage}/edges", plain, first, FINALISTS)
        curves = [
            proposal(near.edges, *values)
            for near in best[:2]
            for values in product(EXPONENTS, ATTENTION_FACTORS, TEMPERATURES)
        ]
        best = best_of(search, f"{stage}/curves", best + curves, first, FINALISTS)
        return best_of(search, f"{stage}/finalists", best, second, 1)[0]


def _goals(task: Task[BonsaiOptions]) -> list[int]:
    """Parameters removed at the end of each round."""
    budget = task.budget
    steps = math.ceil(round(budget / task.layout.num_decoder_parameters / STEP, 6))
    rounds = task.options.rounds or steps
    return [budget * number // rounds for number in range(1, rounds + 1)]


@dataclass(frozen=True)
class _Cost:
    """Cost of removing a fraction of what is left of a group, in nats per token."""

    fraction: float
    nats: float


def _probe(
    search: Search[BonsaiOptions],
    stage: str,
    keep: torch.Tensor,
    prior: torch.Tensor,
    input_ids: torch.Tensor,
) -> list[_Cost | None]:
    """Cost of thinning out each group of `keep`; None for a group that was removed."""
    layout = search.task.layout
    order = torch.where(keep, prior, -1.0)
    removed = [len(group) - _left(group, keep) for group in layout.groups]
    masks, fractions = [keep], []
    for index, group in enumerate(layout.groups):
        left = _left(group, keep)
        taken = max(1, round(REACH[group.kind] * left)) if left else 0
        counts = list(removed)
        counts[index] += taken
        masks.append(plan_mask(layout, order, counts))
        fractions.append(taken / left if left else 0.0)
    damage = search.damage(stage, torch.stack(masks), input_ids).mean(dim=1, dtype=torch.float64)
    added = (damage[1:] - damage[0]).nan_to_num(nan=1e6, posinf=1e6).clamp_min(1e-6)
    return [
        _Cost(fraction, float(nats)) if fraction else None
        for fraction, nats in zip(fractions, added, strict=True)
    ]


def _whole_costs(
    layout: Layout,
    costs: list[_Cost | None],
    edges: tuple[float, float],
    exponent: float,
    attention_factor: float,
    temperature: float,
) -> list[float]:
    """Cost of removing each whole group, by its curve; nan for a group that was removed."""
    kinds = [group.kind for group in layout.groups]
    whole = [cost.nats / cost.fraction**exponent if cost else math.nan for cost in costs]
    layers = layout.decoder.num_layers
    found = []
    for group, cost in zip(layout.groups, whole, strict=True):
        median = float(
            np.nanmedian([c for k, c in zip(kinds, whole, strict=True) if k == group.kind])
        )
        value = median * max(cost / median, SMALLEST_COST) ** temperature
        if group.kind in ATTENTION:
            value *= attention_factor
        if is_spared(group.layer, layers, edges):
            value *= SPARED
        found.append(value if math.isfinite(cost) else math.nan)
    return found


def _relevance(
    layout: Layout,
    whole: list[float],
    exponent: float,
    keep: torch.Tensor,
    prior: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """What each unit adds to its group's cost after those of lower prior: float64 [P].

    Units that were removed have negative relevance, in the order in which they were removed.
    """
    relevance = before - before.max() - 1.0
    for group, cost in zip(layout.groups, whole, strict=True):
        if math.isnan(cost):
            continue
        inside = keep[group.start : group.stop].nonzero().flatten() + group.start
        places = inside[prior[inside].argsort(stable=True)]
        count = len(places)
        increments = cost * np.diff((np.arange(count + 1) / count) ** exponent)
        increments[max(1, round(REACH[group.kind] * count)) :] *= SPARED
        relevance[places] = torch.from_numpy(increments)
    return relevance


def _left(group: Group, keep: torch.Tensor) -> int:
    return int(keep[group.start : group.stop].sum())
