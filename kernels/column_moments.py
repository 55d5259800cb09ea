"""Sums over all tokens of every channel's square, magnitude and value, and its largest magnitude.

x [T, C] -> partial sums float32 [3, splits, C] and maxima [splits, C], then float64 [3, C] and
float32 [C]. Every element is read once. A split is ROWS_PER_SPLIT tokens on any GPU, and splits
are added in float64 in a fixed order: results are the same from run to run, and float32 adds up
only a few hundred numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import tunable

ROWS_PER_SPLIT = 512


# Compiled ahead of time, not yet timed on a GPU: 128-bit loads, no spill.
@triton.autotune(
    configs=tunable(
        triton.Config({"BLOCK_T": 8, "BLOCK_C": 128}, num_warps=4),
        triton.Config({"BLOCK_T": 4, "BLOCK_C": 256}, num_warps=4),
        triton.Config({"BLOCK_T": 16, "BLOCK_C": 64}, num_warps=4),
    ),
    key=["num_channels"],
)
@triton.jit(do_not_specialize=["num_rows", "stride_sm"])
def _column_moments_kernel(
    x_ptr, sums_ptr, largest_ptr,                        # [T, C] -> [3, splits, C], [splits, C]
    num_rows, num_channels,
    stride_xt, stride_sm,
    SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_channels, BLOCK_C)
    split = (tl.program_id(0) // num_tiles).to(tl.int64)
    offs_c = tl.program_id(0) % num_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, BLOCK_T)
    inside = (offs_c < num_channels)[None, :]
    base = x_ptr + split * SPLIT * stride_xt + offs_t[:, None] * stride_xt + offs_c[None, :]
    num_left = num_rows - split * SPLIT

    # Lanes are added up only at the end.
    squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    magnitudes = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    values = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    largest = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    # Two loads in flight per thread, with the registers of one.
    for begin in tl.range(0, SPLIT, BLOCK_T, loop_unroll_factor=2):
        mask = inside & (begin + offs_t < num_left)[:, None]
        x = tl.load(base + begin * stride_xt, mask=mask, other=0.0).to(tl.float32)
        magnitude = tl.abs(x)
        squares += x * x
        magnitudes += magnitude
        values += x
        largest = tl.maximum(largest, magnitude)

    magnitude = tl.sum(magnitudes, axis=0)
    # A maximum drops NaN, a sum does not.
    peak = tl.where(magnitude != magnitude, magnitude, tl.max(largest, axis=0))
    place = split * num_channels + offs_c
    mask = offs_c < num_channels
    tl.store(sums_ptr + place, tl.sum(squares, axis=0), mask=mask)
    tl.store(sums_ptr + stride_sm + place, magnitude, mask=mask)
    tl.store(sums_ptr + 2 * stride_sm + place, tl.sum(values, axis=0), mask=mask)
    tl.store(largest_ptr + place, peak, mask=mask)


def column_moments_triton(x: Tensor, out: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Launch the kernel; `x` and `out` are those of `bonsai_fast.ops.column_moments`."""
    num_rows, num_channels = x.shape
    num_splits = triton.cdiv(num_rows, ROWS_PER_SPLIT)
    options = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty(3, num_splits, num_channels, **options)
    # With the row of zeros there is a maximum even of no splits.
    largest = torch.zeros(1 + num_splits, num_channels, **options)
    if x.numel():

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (num_splits * triton.cdiv(num_channels, meta["BLOCK_C"]),)

        _column_moments_kernel[grid](
            x, sums, largest[1:],
            num_rows, num_channels,
            x.stride(0), sums.stride(0),
            SPLIT=ROWS_PER_SPLIT,
        )  # fmt: skip
    for part, total in zip(out, sums.sum(dim=1, dtype=torch.float64), strict=False):
        part.copy_(total)
    torch.amax(largest, dim=0, out=out[3])
