"""Down projection of kept channels, added to the residual stream.

    out[t, n] = residual[t, n] + bias[n] + sum_c a[t, c] * W[index[row's sub-model, c], n]

a [T, width] from kept_up_proj, W [I, N] (the transposed weight: a channel's column is one run of
memory), residual [T, N] -> out [T, N]. The list of kept rows is read one step ahead and carried in
registers: loads that depend on a load in the same step would halve the depth of the pipeline.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import tile, tuned
from bonsai_fast.kernels._sizes import BLOCK_ROWS
from bonsai_fast.kernels._tiles import PRECISION, add_and_store, row_tile

# Compiled ahead of time, not yet timed on a GPU: no spill in the loop (tests/ops/test_aot.py).
CONFIGS = {
    ("ampere", 2): (tile(128, 32, 4, 4), tile(256, 32, 8, 4)),
    ("hopper", 2): (tile(256, 64, 8, 4), tile(128, 64, 8, 4)),
    ("ampere", 4): (tile(64, 32, 8, 3),),
    ("hopper", 4): (tile(64, 32, 4, 3),),
}
# Every BLOCK_N above divides it.
WIDEST = 256


@triton.jit(do_not_specialize=["num_tiles"])
def _kept_down_proj_kernel(
    a_ptr, weight_ptr, index_ptr, count_ptr, tiles_ptr, bias_ptr, residual_ptr, out_ptr,
    num_outputs, num_tiles,
    stride_at, stride_wi, stride_ik, stride_rt, stride_ot,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    group, begin, end, column = row_tile(tiles_ptr, num_tiles, tl.cdiv(num_outputs, BLOCK_N))
    count = tl.load(count_ptr + group)

    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    a_offs = tl.minimum(offs_t, end - begin - 1)[:, None] * stride_at + offs_k[None, :]
    a_base = a_ptr + begin.to(tl.int64) * stride_at
    slots = index_ptr + group.to(tl.int64) * stride_ik + offs_k

    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    rows = tl.load(slots)
    # The last step may pass the end: there `a` is zero, and the list repeats a kept row.
    for _ in range(0, count, BLOCK_K):
        slots += BLOCK_K
        next_rows = tl.load(slots)
        a = tl.load(a_base + a_offs)
        weight_ptrs = weight_ptr + (rows[:, None] * stride_wi + offs_n[None, :])
        if EVEN_N:
            weight = tl.load(weight_ptrs)
        else:
            weight = tl.load(weight_ptrs, mask=(offs_n < num_outputs)[None, :], other=0.0)
        acc = tl.dot(a, weight, acc, input_precision=PRECISION)
        a_base += BLOCK_K
        rows = next_rows

    add_and_store(
        acc, bias_ptr, residual_ptr, out_ptr,
        begin, end, offs_n, num_outputs,
        stride_rt, stride_ot,
        HAS_BIAS, HAS_RESIDUAL, BLOCK_T,
    )  # fmt: skip


def kept_down_proj_triton(
    a: Tensor, weight_t: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None, residual: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel; the arguments and `out` are those of `bonsai_fast.ops.kept_down_proj`."""
    num_outputs = out.shape[1]
    kernel = tuned(_kept_down_proj_kernel, CONFIGS, a, ("num_outputs",))

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (len(tiles) * triton.cdiv(num_outputs, meta["BLOCK_N"]),)

    kernel[grid](
        a, weight_t, index, count, tiles, bias, residual, out,
        num_outputs, len(tiles),
        a.stride(0), weight_t.stride(0), index.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        BLOCK_T=BLOCK_ROWS, EVEN_N=num_outputs % WIDEST == 0,
    )  # fmt: skip
