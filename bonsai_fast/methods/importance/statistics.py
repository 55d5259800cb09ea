"""Statistics of the inputs of every output projection, from one pass over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from bonsai_fast import ops
from bonsai_fast.models import Block, ExpertsBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.ops.native import ChannelMoments
from bonsai_fast.scoring import ExpertCall, MaskScorer, experts_watched

# experts that a note lists by number
SHOWN = 8


@dataclass(eq=False)
class BlockStatistics:
    """Moments, over all tokens, of every input column of one output projection.

    Attributes:
        num_tokens: number of tokens.
        sum_of_squares, sum_abs, sum: float64 [in_features].
        max_abs: float32 [in_features].
    """

    num_tokens: int
    sum_of_squares: torch.Tensor
    sum_abs: torch.Tensor
    sum: torch.Tensor
    max_abs: torch.Tensor

    @property
    def root_mean_square(self) -> torch.Tensor:
        """float64 [in_features]."""
        return (self.sum_of_squares / self.num_tokens).sqrt()

    @property
    def mean_abs(self) -> torch.Tensor:
        """float64 [in_features]."""
        return self.sum_abs / self.num_tokens

    @property
    def mean(self) -> torch.Tensor:
        """float64 [in_features]."""
        return self.sum / self.num_tokens

    @property
    def variance(self) -> torch.Tensor:
        """Unbiased, float64 [in_features]; zero for a single token."""
        spread = self.sum_of_squares - self.sum.square() / self.num_tokens
        return spread.clamp_min(0.0) / max(1, self.num_tokens - 1)

    def add(self, moments: ChannelMoments, num_tokens: int) -> None:
        """Merge another batch of tokens."""
        self.num_tokens += num_tokens
        self.sum_of_squares += moments.sum_of_squares.cpu()
        self.sum_abs += moments.sum_abs.cpu()
        self.sum += moments.sum.cpu()
        self.max_abs = torch.maximum(self.max_abs, moments.max_abs.cpu())


@dataclass(eq=False)
class ExpertStatistics:
    """What the experts of a mixture were chosen for.

    Attributes:
        routed: int64 [E], tokens that chose each expert.
        weighted_norms: float64 [E], sum over these tokens of the router's weight times the
            Euclidean norm of the expert's output.
    """

    routed: torch.Tensor
    weighted_norms: torch.Tensor

    @property
    def saliency(self) -> torch.Tensor:
        """REAP's: the mean over the routed tokens; zero where there are none. float64 [E]."""
        return self.weighted_norms / self.routed.clamp_min(1)

    @property
    def unreached(self) -> list[int]:
        """Experts that no token chose."""
        found: list[int] = (self.routed == 0).nonzero().flatten().tolist()
        return found


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of every sub-layer, and the losses of the same pass.

    A mixture of experts counts as one projection whose input holds, for every expert, what its own
    output projection reads times the router's weight: zeros for the tokens that did not choose it.

    Attributes:
        blocks: statistics by `block.output`, the path of the output projection.
        losses: float32 [B], the parent's loss on every sequence.
        experts: of mixtures of experts alone, by the same path.
    """

    blocks: dict[str, BlockStatistics]
    losses: torch.Tensor
    experts: dict[str, ExpertStatistics] = field(default_factory=dict)

    def of(self, block: Block) -> BlockStatistics:
        """Statistics of one sub-layer."""
        return self.blocks[block.output]


def collect_statistics(
    scorer: MaskScorer, keep: torch.Tensor, input_ids: torch.Tensor
) -> Statistics:
    """Run the sub-model `keep` once over the text and record its output projections' inputs.

    Args:
        scorer: the parent's scorer.
        keep: bool [P]; removed units stay removed; their own statistics have no meaning.
        input_ids: int64 [B, T].
    """
    blocks: dict[str, BlockStatistics] = {}
    routed: dict[str, ExpertStatistics] = {}
    with ExitStack() as stack:
        for block in scorer.layout.decoder.blocks():
            if isinstance(block, ExpertsBlock):
                experts = scorer.model.get_submodule(block.experts)
                record = _expert_recorder(block, blocks, routed)
                stack.enter_context(experts_watched(experts, record))
                continue
            module = scorer.model.get_submodule(block.output)
            stack.callback(module.register_forward_pre_hook(_recorder(block, blocks)).remove)
        losses = scorer.score(keep[None], input_ids)[0]
    return Statistics(blocks, losses, routed)


def unreached_experts(layout: Layout, keep: torch.Tensor, statistics: Statistics) -> list[str]:
    """One line for each mixture with kept experts that no calibration token chose.

    Args:
        layout: the units.
        keep: bool [P], what the text ran through.
        statistics: of this text.
    """
    found = []
    for block, kept in layout.keep_by_block(keep):
        if not isinstance(block, ExpertsBlock):
            continue
        there = kept if block.unit == "expert" else kept.any().expand(block.num_experts)
        experts = [e for e in statistics.experts[block.output].unreached if bool(there[e])]
        if experts:
            listed = ", ".join(map(str, experts[:SHOWN])) + (", ..." if experts[SHOWN:] else "")
            found.append(
                f"layer {block.layer}: no calibration token reached {len(experts)} of "
                f"{int(there.sum())} experts ({listed}); more text may tell what they are worth"
            )
    return found


def _recorder(
    block: Block, blocks: dict[str, BlockStatistics]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        states = inputs[0].reshape(-1, inputs[0].shape[-1])
        if block.output not in blocks:
            blocks[block.output] = _empty(states.shape[1])
        moments = ChannelMoments(*ops.column_moments(states))
        blocks[block.output].add(moments, len(states))

    return record


def _expert_recorder(
    block: ExpertsBlock, blocks: dict[str, BlockStatistics], routed: dict[str, ExpertStatistics]
) -> Callable[[Sequence[ExpertCall], int], None]:
    experts, channels = block.num_experts, block.num_channels
    total = blocks[block.output] = _empty(experts * channels)
    counts = routed[block.output] = ExpertStatistics(
        torch.zeros(experts, dtype=torch.int64), torch.zeros(experts, dtype=torch.float64)
    )

    def record(calls: Sequence[ExpertCall], num_tokens: int) -> None:
        total.num_tokens += num_tokens
        for call in calls:
            columns = slice(call.expert * channels, (call.expert + 1) * channels)
            weighted = (call.inner * call.weights[:, None]).to(call.inner.dtype)
            moments = ChannelMoments(*ops.column_moments(weighted))
            total.sum_of_squares[columns] += moments.sum_of_squares.cpu()
            total.sum_abs[columns] += moments.sum_abs.cpu()
            total.sum[columns] += moments.sum.cpu()
            total.max_abs[columns] = torch.maximum(total.max_abs[columns], moments.max_abs.cpu())
            norms = call.output.float().norm(dim=1) * call.weights.float()
            counts.routed[call.expert] += len(norms)
            counts.weighted_norms[call.expert] += float(norms.double().sum())

    return record


def _empty(columns: int) -> BlockStatistics:
    zeros = torch.zeros(columns, dtype=torch.float64)
    return BlockStatistics(0, zeros, zeros.clone(), zeros.clone(), zeros.float())
