"""Sums over all tokens of each channel's square, magnitude and value, and its largest magnitude."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bonsai_fast.ops._checks import check_floats
from bonsai_fast.ops._register import register
from bonsai_fast.ops.native import channel_moments


@register()
def column_moments(x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Sums over all tokens of each channel's square, magnitude and value; its largest magnitude.

    Results are the same from run to run. NaN and Inf stay in their channel.

    Args:
        x: [T, C] float16, bfloat16 or float32, contiguous along C.

    Returns:
        Sum of squares, sum of magnitudes and sum, each [C] float64, and the largest magnitude, [C]
        float32: the fields of `ChannelMoments`. All zero without tokens. On CUDA squares are
        float32: the square of a number beyond 1.8e19 is infinite.

    Raises:
        ValueError: `x` does not fit this description.
    """
    check_floats("x", x, "T", "C")
    num_channels = x.shape[1]
    squares, magnitudes, values = (x.new_empty(num_channels, dtype=torch.float64) for _ in range(3))
    out = squares, magnitudes, values, x.new_empty(num_channels, dtype=torch.float32)
    yield out
    for part, moment in zip(out, channel_moments(x), strict=True):
        part.copy_(moment)
