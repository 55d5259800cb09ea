"""Query, key or value projection of the heads that every row's sub-model needs.

    out[t, c] = rope(norm(x[t] . W[head's D rows] + b)),   head = index[row's sub-model, c]

x [T, H], W [heads * D, H] -> out [T, slots, D]: the listed heads next to each other, zeros after
them. Norm (RMS over a head, as in Qwen3) and rotary embedding are optional. Columns d and d + R/2,
which the rotation mixes, are neighbours in the accumulator: the rotation is local to a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import depth, tuned
from bonsai_fast.kernels._sizes import BLOCK_ROWS
from bonsai_fast.kernels._tiles import multiply, row_tile

# Compiled ahead of time, not yet timed on a GPU: no spill in the loop (tests/ops/test_aot.py).
# Tiles wider than 128 columns spill in the rotation.
CONFIGS = {
    ("ampere", 2): (depth(32, 8, 4), depth(32, 4, 4)),
    ("hopper", 2): (depth(64, 8, 4), depth(64, 4, 4)),
    ("ampere", 4): (depth(16, 8, 3),),
    ("hopper", 4): (depth(16, 8, 3),),
}
# Every BLOCK_K above divides it.
DEEPEST = 64
# Columns of a tile: one head, or several small ones.
WIDTH = 128


# These change from wave to wave and must not compile the kernel again.
@triton.jit(do_not_specialize=["num_slots", "num_tiles", "stride_ik"])
def _kept_head_proj_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, cos_ptr, sin_ptr, positions_ptr,
    index_ptr, count_ptr, tiles_ptr, out_ptr,
    hidden_size, num_slots, num_tiles, norm_eps,
    stride_xt, stride_wd, stride_cp, stride_ik, stride_ot,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = HEADS * BLOCK_D
    HALF: tl.constexpr = ROTARY_DIM // 2
    group, begin, end, column = row_tile(tiles_ptr, num_tiles, tl.cdiv(num_slots, HEADS))
    count = tl.load(count_ptr + group)
    first = column * HEADS

    # Pairs (d, d + HALF) where the rotation acts, (d, d + 1) after it.
    offs_n = tl.arange(0, BLOCK_N)
    pair = offs_n % BLOCK_D // 2
    side = offs_n % 2
    offs_d = tl.where(pair < HALF, pair + side * HALF, 2 * pair + side)
    heads = tl.load(index_ptr + group.to(tl.int64) * stride_ik + first + offs_n // BLOCK_D)
    # Columns past the head repeat its last one; they are not stored.
    weight_row = heads * HEAD_DIM + tl.minimum(offs_d, HEAD_DIM - 1)
    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    local = tl.minimum(offs_t, end - begin - 1)
    x_offs = local[:, None] * stride_xt + offs_k[None, :]
    weight_offs = weight_row[None, :] * stride_wd + offs_k[:, None]
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
    if HAS_NORM:
        tl.static_assert(HEADS == 1)
        squares = tl.where((offs_d < HEAD_DIM)[None, :], acc * acc, 0.0)
        mean_square = tl.sum(squares, axis=1) / HEAD_DIM
        norm = tl.load(norm_ptr + tl.minimum(offs_d, HEAD_DIM - 1)).to(tl.float32)
        acc = acc * tl.rsqrt(mean_square + norm_eps)[:, None] * norm[None, :]

    left, right = tl.split(tl.reshape(acc, [BLOCK_T, BLOCK_N // 2, 2]))
    offs_p = tl.arange(0, BLOCK_N // 2)
    pair = offs_p % (BLOCK_D // 2)
    if HAS_ROPE:
        rotates = (pair < HALF)[None, :]
        position = tl.load(positions_ptr + begin.to(tl.int64) + local).to(tl.int64)
        table_offs = position[:, None] * stride_cp + pair[None, :]
        cos = tl.load(cos_ptr + table_offs, mask=rotates, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + table_offs, mask=rotates, other=0.0).to(tl.float32)
        turned = tl.where(rotates, left * cos - right * sin, left)
        right = tl.where(rotates, right * cos + left * sin, right)
        left = turned

    slot = first + offs_p // (BLOCK_D // 2)
    kept = (slot < count)[None, :]
    offs_d = tl.where(pair < HALF, pair, 2 * pair)
    inside = (offs_t < end - begin)[:, None] & (slot < num_slots)[None, :]
    inside = inside & (pair < HEAD_DIM // 2)[None, :]
    out_base = out_ptr + begin.to(tl.int64) * stride_ot
    out_offs = offs_t[:, None] * stride_ot + (slot * HEAD_DIM + offs_d)[None, :]
    to_right = tl.where(pair < HALF, HALF, 1)[None, :]
    left = tl.where(kept, left, 0.0).to(out_ptr.dtype.element_ty)
    right = tl.where(kept, right, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_base + out_offs, left, mask=inside)
    tl.store(out_base + out_offs + to_right, right, mask=inside)


def kept_head_proj_triton(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None, norm_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, positions: Tensor | None,
    head_dim: int, norm_eps: float,
    out: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel; the arguments and `out` are those of `bonsai_fast.ops.kept_head_proj`."""
    num_slots, hidden_size = out.shape[1], x.shape[1]
    block_d = max(16, triton.next_power_of_2(head_dim))
    heads = 1 if norm_weight is not None else max(1, WIDTH // block_d)
    kernel = tuned(_kept_head_proj_kernel, CONFIGS, x, ("hidden_size", "HEAD_DIM"))
    kernel[(len(tiles) * triton.cdiv(num_slots, heads),)](
        x, weight, bias, norm_weight, cos, sin, positions,
        index, count, tiles, out,
        hidden_size, num_slots, len(tiles), float(norm_eps),
        x.stride(0), weight.stride(0), 0 if cos is None else cos.stride(0),
        index.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, HAS_NORM=norm_weight is not None, HAS_ROPE=cos is not None,
        HEAD_DIM=head_dim, ROTARY_DIM=0 if cos is None else 2 * cos.shape[1], HEADS=heads,
        BLOCK_D=block_d, BLOCK_T=BLOCK_ROWS, EVEN_K=hidden_size % DEEPEST == 0,
    )  # fmt: skip
