"""Complete plans, which are scored as they would be saved, and text to score them on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bonsai_fast.methods.allocation import select_units
from bonsai_fast.methods.session import Search, finished
from bonsai_fast.methods.task import Task
from bonsai_fast.methods.units.bonsai_options import BonsaiOptions
from bonsai_fast.scoring import OutputWeights

# calibration sequences for probes and plans, and others for the finalists; statistics read all of
# them: they need much more text than a comparison of plans
SEARCH_SEQUENCES = 6
FINALIST_SEQUENCES = 6
# units of a spared layer cost this many times as much
SPARED = 1000.0


@dataclass(frozen=True, eq=False)
class Proposal:
    """A complete plan: units kept, bool [P], and the relevance that selected them, float64 [P]."""

    keep: Tensor
    relevance: Tensor
    name: str
    edges: tuple[float, float]


def texts_of(task: Task[BonsaiOptions]) -> tuple[Tensor, Tensor]:
    """Sequences for the search and, from other parts of the text, for the finalists."""
    input_ids = task.calibration.input_ids
    stride = max(1, len(input_ids) // max(SEARCH_SEQUENCES, FINALIST_SEQUENCES))
    first = input_ids[::stride][:SEARCH_SEQUENCES]
    second = input_ids[stride // 2 :: stride][:FINALIST_SEQUENCES]
    return first.contiguous(), second.contiguous()


def is_spared(layer: int, num_layers: int, edges: tuple[float, float]) -> bool:
    """Whether a layer is among the first or last ones, given as shares of all layers."""
    first, last = (round(share * num_layers) for share in edges)
    return not first <= layer < num_layers - last


def propose(
    search: Search[BonsaiOptions],
    keep: Tensor,
    relevance: Tensor,
    budget: int,
    name: str,
    edges: tuple[float, float] = (0.0, 0.0),
) -> Proposal:
    """Remove the least relevant units per parameter, in the requested shapes."""
    layout = search.task.layout
    chosen = select_units(layout, relevance, keep, budget=budget, order="relevance_per_parameter")
    return Proposal(finished(search, chosen, relevance, budget), relevance, name, edges)


def best_of(
    search: Search[BonsaiOptions],
    stage: str,
    proposals: list[Proposal],
    input_ids: Tensor,
    count: int,
    *,
    output_weights: OutputWeights | None = None,
) -> list[Proposal]:
    """Score complete plans, each once, and return the best ones.

    Args:
        stage, input_ids, output_weights: see `Search.losses`.
        proposals: the plans.
        count: how many to return, at most.
    """
    distinct: dict[bytes, Proposal] = {}
    for proposal in proposals:
        distinct.setdefault(proposal.keep.numpy().tobytes(), proposal)
    plans = list(distinct.values())
    keep = torch.stack([plan.keep for plan in plans])
    losses = search.losses(stage, keep, input_ids, output_weights=output_weights)
    mean = losses.mean(dim=1, dtype=torch.float64).nan_to_num(nan=math.inf)
    ranking = mean.argsort(stable=True)[:count].tolist()
    search.reporter.note(
        f"{stage}: {float(mean[ranking[0]]):.3f} nats per token at best "
        f"({plans[ranking[0]].name}), {float(mean.max()):.3f} at worst"
    )
    return [plans[position] for position in ranking]
