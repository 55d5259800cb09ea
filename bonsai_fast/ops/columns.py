"""Statistics of channels, and copies of the kept ones."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.kernels._checks import check_column_moments, check_compact
from bonsai_fast.ops.native import channel_moments


@torch.library.custom_op("bonsai_fast::column_moments", mutates_args=())
def column_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over all tokens of every channel's square, magnitude and value, and its largest size.

    Results are the same from run to run. NaN and Inf stay in their channel.

    Args:
        x: [T, C] float16, bfloat16 or float32, contiguous along C.

    Returns:
        Sum of squares, sum of magnitudes and sum, each [C] float64, and the largest magnitude, [C]
        float32: the fields of `ChannelMoments`. All zero without tokens. On CUDA squares are
        float32, so that those of numbers beyond 1.8e19 are infinite.

    Raises:
        ValueError: `x` is none of this.
    """
    check_column_moments(x)
    squares, magnitudes, values, largest = channel_moments(x)
    return squares, magnitudes, values, largest


@column_moments.register_kernel("cuda")
def _column_moments_cuda(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bonsai_fast.kernels.column_moments import column_moments_triton

    return column_moments_triton(x)


@column_moments.register_fake
def _column_moments_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_column_moments(x)
    squares, magnitudes, values = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(3))
    return squares, magnitudes, values, x.new_empty(x.shape[1], dtype=torch.float32)


@torch.library.custom_op("bonsai_fast::compact_rows", mutates_args=("out",))
def compact_rows(source: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy kept rows side by side into a workspace, zeros behind them.

        out[r] = source[index[r]] for r < n, 0 from n on

    Args:
        source: [R, C] float16, bfloat16 or float32, contiguous along C.
        index: int32 [n] in 0..R-1.
        out: [m, C] in the dtype of `source`, m >= n; overwritten.

    Raises:
        ValueError: an argument is none of these.
    """
    check_compact(source, index, out, 0)
    out[: len(index)] = source[index.long()]
    out[len(index) :] = 0


@compact_rows.register_kernel("cuda")
def _compact_rows_cuda(source: Tensor, index: Tensor, out: Tensor) -> None:
    from bonsai_fast.kernels.compact import compact_rows_triton

    compact_rows_triton(source, index, out)


@compact_rows.register_fake
def _compact_rows_fake(source: Tensor, index: Tensor, out: Tensor) -> None:
    check_compact(source, index, out, 0)


@torch.library.custom_op("bonsai_fast::compact_columns", mutates_args=("out",))
def compact_columns(source: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy kept columns side by side into a workspace, zeros behind them.

        out[:, c] = source[:, index[c]] for c < n, 0 from n on

    Args:
        source: [R, C] float16, bfloat16 or float32, contiguous along C.
        index: int32 [n] in 0..C-1.
        out: [R, m] in the dtype of `source`, m >= n; overwritten.

    Raises:
        ValueError: an argument is none of these.
    """
    check_compact(source, index, out, 1)
    out[:, : len(index)] = source[:, index.long()]
    out[:, len(index) :] = 0


@compact_columns.register_kernel("cuda")
def _compact_columns_cuda(source: Tensor, index: Tensor, out: Tensor) -> None:
    from bonsai_fast.kernels.compact import compact_columns_triton

    compact_columns_triton(source, index, out)


@compact_columns.register_fake
def _compact_columns_fake(source: Tensor, index: Tensor, out: Tensor) -> None:
    check_compact(source, index, out, 1)
