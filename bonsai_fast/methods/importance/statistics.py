"""Statistics of the inputs of every output projection, from one pass over calibration text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from bonsai_fast import ops
from bonsai_fast.models import Block
from bonsai_fast.ops.native import ChannelMoments
from bonsai_fast.scoring import MaskScorer


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


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of every sub-layer, and the losses of the same pass.

    Attributes:
        blocks: statistics by `block.output`, the path of the output projection.
        losses: float32 [B], the parent's loss on every sequence.
    """

    blocks: dict[str, BlockStatistics]
    losses: torch.Tensor

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
    with ExitStack() as stack:
        for block in scorer.layout.decoder.blocks():
            module = scorer.model.get_submodule(block.output)
            stack.callback(module.register_forward_pre_hook(_recorder(block, blocks)).remove)
        losses = scorer.score(keep[None], input_ids)[0]
    return Statistics(blocks, losses)


def _recorder(
    block: Block, blocks: dict[str, BlockStatistics]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        states = inputs[0].reshape(-1, inputs[0].shape[-1])
        if block.output not in blocks:
            zeros = torch.zeros(states.shape[1], dtype=torch.float64)
            blocks[block.output] = BlockStatistics(
                0, zeros, zeros.clone(), zeros.clone(), zeros.float()
            )
        moments = ChannelMoments(*ops.column_moments(states))
        blocks[block.output].add(moments, len(states))

    return record
