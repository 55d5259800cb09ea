"""Activation of an MLP and its channel mask in one pass over the up projection's output.

    out[t, i] = keep[row_group[t], i] ? act(gate[t, i]) * up[t, i] : 0

gate_up [T, 2I] (gate first, then up; [T, I] without a gate), keep [K, I], row_group [T] ->
out [T, I]. Every element is read and written once, in its own dtype; eager PyTorch reads and writes
[T, I] once more for the activation and once more for the mask. A masked channel is selected away,
not multiplied: NaN or Inf there gives 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import tunable
from bonsai_fast.kernels._tiles import activate


# Compiled ahead of time, not yet timed on a GPU: 128-bit loads, no spill.
@triton.autotune(
    configs=tunable(
        triton.Config({"BLOCK_I": 1024}, num_warps=4),
        triton.Config({"BLOCK_I": 2048}, num_warps=4),
        triton.Config({"BLOCK_I": 2048}, num_warps=8),
    ),
    key=["num_channels"],
)
@triton.jit
def _glu_mask_kernel(
    gate_up_ptr, keep_ptr, row_group_ptr, out_ptr,       # [T, 2I], [K, I], [T] -> [T, I]
    num_channels,
    stride_gt, stride_kk, stride_ot,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_channels, BLOCK_I)
    # One axis: the other axes of a grid end at 65535, and a wave has more rows.
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    offs = tl.program_id(0) % num_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = offs < num_channels
    group = tl.load(row_group_ptr + row).to(tl.int64)
    keep = tl.load(keep_ptr + group * stride_kk + offs, mask=inside, other=0)
    gate = tl.load(gate_up_ptr + row * stride_gt + offs, mask=inside, other=0.0)
    value = activate(gate.to(tl.float32), ACTIVATION)
    if GATED:
        up = tl.load(gate_up_ptr + row * stride_gt + num_channels + offs, mask=inside, other=0.0)
        value *= up.to(tl.float32)
    value = tl.where(keep != 0, value, 0.0)
    tl.store(out_ptr + row * stride_ot + offs, value.to(out_ptr.dtype.element_ty), mask=inside)


def glu_mask_triton(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, activation: str, gated: bool, out: Tensor
) -> None:
    """Launch the kernel; the arguments and `out` are those of `bonsai_fast.ops.glu_mask`."""
    num_rows, num_channels = out.shape

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (num_rows * triton.cdiv(num_channels, meta["BLOCK_I"]),)

    _glu_mask_kernel[grid](
        gate_up, keep.view(torch.uint8), row_group, out,
        num_channels,
        gate_up.stride(0), keep.stride(0), out.stride(0),
        GATED=gated, ACTIVATION=activation,
    )  # fmt: skip
