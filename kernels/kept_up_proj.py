"""Up projection (with its gate) of the channels that every row's sub-model keeps.

    out[t, c] = act(x[t] . W[i]) * (x[t] . W[I + i]),   i = index[row's sub-model, c]

x [T, H], W [2I, H] (gate rows first, then up rows; [I, H] without a gate) -> out [T, width]:
the kept channels next to each other, zeros after them. Weight rows are gathered straight into the
matrix product: no sub-model's weights are copied. Gate and up are neighbouring columns of one
accumulator (g0 u0 g1 u1 ...): one product, and the activation is local to a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import tile, tuned
from bonsai_fast.kernels._sizes import BLOCK_ROWS
from bonsai_fast.kernels._tiles import activate, multiply, row_tile

# Compiled ahead of time, not yet timed on a GPU: no spill in the loop (tests/ops/test_aot.py).
CONFIGS = {
    ("ampere", 2): (tile(128, 32, 4, 4), tile(256, 32, 8, 4)),
    ("hopper", 2): (tile(256, 64, 8, 4), tile(128, 64, 8, 4)),
    ("ampere", 4): (tile(64, 32, 8, 3),),
    ("hopper", 4): (tile(64, 32, 4, 3),),
}

# Every BLOCK_K above divides it.
DEEPEST = 64


@triton.jit(do_not_specialize=["num_tiles"])
def _kept_up_proj_kernel(
    x_ptr, weight_ptr, bias_ptr, index_ptr, count_ptr, tiles_ptr, out_ptr,
    hidden_size, num_channels, width, num_tiles,
    stride_xt, stride_wi, stride_ik, stride_ot,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    BLOCK_C: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    group, begin, end, column = row_tile(tiles_ptr, num_tiles, tl.cdiv(width, BLOCK_C))
    count = tl.load(count_ptr + group)
    first = column * BLOCK_C

    offs_n = tl.arange(0, BLOCK_N)
    slots = index_ptr + group.to(tl.int64) * stride_ik + first
    if GATED:
        # One base and an int32 offset: two bases would cost registers and alignment.
        weight_row = tl.load(slots + offs_n // 2) + offs_n % 2 * num_channels
    else:
        weight_row = tl.load(slots + offs_n)
    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one: no mask in the loop.
    x_offs = tl.minimum(offs_t, end - begin - 1)[:, None] * stride_xt + offs_k[None, :]
    weight_offs = weight_row[None, :] * stride_wi + offs_k[:, None]
    x_base = x_ptr + begin.to(tl.int64) * stride_xt

    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    # A tile past the end keeps nothing: no step here, and zeros below.
    stop = tl.where(first < count, hidden_size, 0)
    acc = multiply(
        acc, x_base, x_offs, weight_ptr, weight_offs,
        stop, hidden_size, offs_k, EVEN_K, BLOCK_K,
    )  # fmt: skip

    if HAS_BIAS:
        acc += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(acc, [BLOCK_T, BLOCK_C, 2]))
        value = activate(gate, ACTIVATION) * up
    else:
        value = activate(acc, ACTIVATION)
    offs_c = first + tl.arange(0, BLOCK_C)
    value = tl.where((offs_c < count)[None, :], value, 0.0)
    out_offs = offs_t[:, None] * stride_ot + offs_c[None, :]
    tl.store(
        out_ptr + begin.to(tl.int64) * stride_ot + out_offs,
        value.to(out_ptr.dtype.element_ty),
        mask=(offs_t < end - begin)[:, None],
    )


def kept_up_proj_triton(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None, activation: str, gated: bool,
    out: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel; the arguments and `out` are those of `bonsai_fast.ops.kept_up_proj`."""
    width, hidden_size, parts = out.shape[1], x.shape[1], 2 if gated else 1
    kernel = tuned(_kept_up_proj_kernel, CONFIGS, x, ("hidden_size", "num_channels"))

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (len(tiles) * triton.cdiv(width, meta["BLOCK_N"] // parts),)

    kernel[grid](
        x, weight, bias, index, count, tiles, out,
        hidden_size, len(weight) // parts, width, len(tiles),
        x.stride(0), weight.stride(0), index.stride(0), out.stride(0),
        GATED=gated, ACTIVATION=activation, HAS_BIAS=bias is not None,
        BLOCK_T=BLOCK_ROWS, EVEN_K=hidden_size % DEEPEST == 0,
    )  # fmt: skip
