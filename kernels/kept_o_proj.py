"""Output projection over kept heads, added to the residual stream.

    out[t, n] = residual[t, n] + bias[n] + sum_{c, d} a[t, c, d] * W[n, head * D + d]
    head = index[row's sub-model, c]

a [T, slots, D] from grouped_attention, W [N, heads * D] as the model holds it, residual [T, N] ->
out [T, N]. A head is a run of D columns of W: whole blocks are read in place, and only a block's
position is looked up, one step ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import tile, tuned
from bonsai_fast.kernels._sizes import BLOCK_ROWS
from bonsai_fast.kernels._tiles import PRECISION, add_and_store, row_tile

# Compiled ahead of time, not yet timed on a GPU: no spill in the loop (tests/ops/test_aot.py).
# A step takes BLOCK_K columns, or fewer where BLOCK_K does not divide a head.
CONFIGS = {
    ("ampere", 2): (tile(128, 32, 4, 4), tile(256, 32, 8, 4)),
    ("hopper", 2): (tile(256, 64, 8, 4), tile(128, 64, 8, 4)),
    ("ampere", 4): (tile(64, 32, 8, 3),),
    ("hopper", 4): (tile(64, 32, 4, 3),),
}


# These change from wave to wave and must not compile the kernel again.
@triton.jit(do_not_specialize=["num_tiles", "stride_ik"])
def _kept_o_proj_kernel(
    a_ptr, weight_ptr, index_ptr, count_ptr, tiles_ptr, bias_ptr, residual_ptr, out_ptr,
    num_outputs, num_tiles,
    stride_at, stride_wn, stride_ik, stride_rt, stride_ot,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DEPTH: tl.constexpr = BLOCK_K if DIVISOR > BLOCK_K else DIVISOR
    STEPS: tl.constexpr = HEAD_DIM // DEPTH
    group, begin, end, column = row_tile(tiles_ptr, num_tiles, tl.cdiv(num_outputs, BLOCK_N))
    count = tl.load(count_ptr + group)

    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, DEPTH)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    a_offs = tl.minimum(offs_t, end - begin - 1)[:, None] * stride_at + offs_k[None, :]
    a_base = a_ptr + begin.to(tl.int64) * stride_at
    # Outputs past the end repeat the last one; they are not stored.
    weight_offs = tl.minimum(offs_n, num_outputs - 1)[None, :] * stride_wn + offs_k[:, None]
    slots = index_ptr + group.to(tl.int64) * stride_ik

    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    head = tl.load(slots)
    for step in range(0, count * STEPS):
        next_head = tl.load(slots + (step + 1) // STEPS)
        a = tl.load(a_base + a_offs)
        weight = tl.load(weight_ptr + (head * HEAD_DIM + step % STEPS * DEPTH) + weight_offs)
        acc = tl.dot(a, weight, acc, input_precision=PRECISION)
        # Slots are contiguous, and so are the steps.
        a_base += DEPTH
        head = next_head

    add_and_store(
        acc, bias_ptr, residual_ptr, out_ptr,
        begin, end, offs_n, num_outputs,
        stride_rt, stride_ot,
        HAS_BIAS, HAS_RESIDUAL, BLOCK_T,
    )  # fmt: skip


def kept_o_proj_triton(
    a: Tensor, weight: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None, residual: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel; the arguments and `out` are those of `bonsai_fast.ops.kept_o_proj`."""
    num_outputs, head_dim = out.shape[1], a.shape[2]
    kernel = tuned(_kept_o_proj_kernel, CONFIGS, a, ("num_outputs", "HEAD_DIM"))

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (len(tiles) * triton.cdiv(num_outputs, meta["BLOCK_N"]),)

    kernel[grid](
        a, weight, index, count, tiles, bias, residual, out,
        num_outputs, len(tiles),
        a.stride(0), weight.stride(0), index.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        # The largest power of two that divides a head.
        HEAD_DIM=head_dim, DIVISOR=head_dim & -head_dim,
        BLOCK_T=BLOCK_ROWS,
    )  # fmt: skip
