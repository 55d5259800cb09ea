"""Attention of kept query heads over the tokens of each sequence, with any query-to-KV map.

    out[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, kv]) v[s, kv],   kv = q_to_kv[sub-model, h]

q [T, Hq, D], k and v [T, Hkv, D], compact as from kept_head_proj -> out [T, Hq, D], zeros in slots
after a sub-model's heads. Sequences follow one another; causal, with an optional sliding window and
softcap. KV heads may have different numbers of query heads: masks of single query heads leave such
models, and library attention does not support them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from bonsai_fast.kernels._configs import tuned
from bonsai_fast.kernels._sizes import BLOCK_ROWS
from bonsai_fast.kernels._tiles import LOWEST, PRECISION, tanh

LOG2_E = math.log2(math.e)


def _block(queries: int, keys: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_Q": queries, "BLOCK_S": keys}, num_warps=warps, num_stages=stages)


# Compiled ahead of time, not yet timed on a GPU: no spill in the loops (tests/ops/test_aot.py).
# By padded head_dim; heads of up to 64 use the tiles of 64.
CONFIGS = {
    64: {
        ("ampere", 2): (_block(128, 64, 4, 3), _block(128, 64, 8, 3)),
        ("hopper", 2): (_block(128, 128, 8, 3), _block(128, 64, 8, 3)),
        ("ampere", 4): (_block(64, 32, 4, 2),),
        ("hopper", 4): (_block(64, 32, 4, 2),),
    },
    128: {
        ("ampere", 2): (_block(128, 64, 8, 2), _block(128, 32, 8, 3)),
        ("hopper", 2): (_block(128, 128, 8, 2), _block(128, 64, 8, 3)),
        ("ampere", 4): (_block(32, 32, 4, 2),),
        ("hopper", 4): (_block(32, 32, 4, 2),),
    },
    256: {
        ("ampere", 2): (_block(64, 32, 8, 2),),
        ("hopper", 2): (_block(128, 64, 8, 2),),
        ("ampere", 4): (_block(16, 16, 8, 2),),
        ("hopper", 4): (_block(16, 16, 8, 2),),
    },
}


@triton.jit
def _attend(
    q, k_base, v_base, acc, peak, total,
    start, stop, length, query, factor, softcap,
    stride_ks, stride_vs,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Fold the keys start..stop-1 of a sequence into the running softmax of a tile of queries."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    for begin in range(start, stop, BLOCK_S):
        key = begin + offs_s
        # Keys past the end repeat the last one and are masked below.
        rows = tl.minimum(key, length - 1) if MASKED else key
        k_ptrs = k_base + (rows[None, :] * stride_ks + offs_d[:, None])
        v_ptrs = v_base + (rows[:, None] * stride_vs + offs_d[None, :])
        if HEAD_DIM == BLOCK_D:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=(offs_d < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        logits = tl.dot(q, k, input_precision=PRECISION) * factor
        if HAS_SOFTCAP:
            logits = softcap * tanh(logits)
        if MASKED:
            seen = (key < length)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= query[:, None])
            if WINDOW > 0:
                seen = seen & (query[:, None] - key[None, :] < WINDOW)
            logits = tl.where(seen, logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


# These change from wave to wave and must not compile the kernel again.
@triton.jit(do_not_specialize=["num_slots", "stride_mk"])
def _grouped_attention_kernel(
    q_ptr, k_ptr, v_ptr, count_ptr, q_to_kv_ptr, tiles_ptr, out_ptr,
    num_slots, factor, softcap,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_mk, stride_ot, stride_oh,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = TILE_ROWS // BLOCK_Q
    # Slots of one tile run at the same time: those that share a KV head find it in the cache.
    slot = tl.program_id(0) % num_slots
    part = tl.program_id(0) // num_slots
    entry = tiles_ptr + (part // PARTS).to(tl.int64) * 4
    group = tl.load(entry)
    first = tl.load(entry + 1) + part % PARTS * BLOCK_Q
    begin = tl.load(entry + 2)
    end = tl.load(entry + 3)
    length = end - begin
    kept = slot < tl.load(count_ptr + group)
    kv = tl.load(q_to_kv_ptr + group.to(tl.int64) * stride_mk + slot).to(tl.int64)

    query = first - begin + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    base = begin.to(tl.int64)
    q_rows = tl.minimum(query, length - 1)
    q_ptrs = q_ptr + base * stride_qt + slot * stride_qh
    q_ptrs += q_rows[:, None] * stride_qt + offs_d[None, :]
    q = tl.load(q_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    k_base = k_ptr + base * stride_kt + kv * stride_kh
    v_base = v_ptr + base * stride_vt + kv * stride_vh

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    # Queries past the end see nothing; nor does a slot past the sub-model's heads.
    stop = tl.minimum(first - begin + BLOCK_Q, length) if CAUSAL else length
    stop = tl.where(kept & (first < end), stop, 0)
    if WINDOW > 0:
        start = tl.maximum(first - begin - WINDOW + 1, 0) // BLOCK_S * BLOCK_S
        middle = start
    else:
        start = 0
        # Whole blocks that every query of the tile sees need no mask.
        whole = tl.minimum(first - begin + 1, length) if CAUSAL else length
        middle = tl.minimum(whole, stop) // BLOCK_S * BLOCK_S
        acc, peak, total = _attend(
            q, k_base, v_base, acc, peak, total,
            start, middle, length, query, factor, softcap,
            stride_kt, stride_vt,
            CAUSAL, WINDOW, HAS_SOFTCAP, False, HEAD_DIM, BLOCK_D, BLOCK_S,
        )  # fmt: skip
    acc, peak, total = _attend(
        q, k_base, v_base, acc, peak, total,
        middle, stop, length, query, factor, softcap,
        stride_kt, stride_vt,
        CAUSAL, WINDOW, HAS_SOFTCAP, True, HEAD_DIM, BLOCK_D, BLOCK_S,
    )  # fmt: skip

    out = tl.where(kept, acc / total[:, None], 0.0)
    out_ptrs = out_ptr + base * stride_ot + slot * stride_oh
    out_ptrs += query[:, None] * stride_ot + offs_d[None, :]
    inside = (query < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, count: Tensor, q_to_kv: Tensor, tiles: Tensor,
    scale: float, causal: bool, window: int | None, softcap: float | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel; arguments and `out` are those of `bonsai_fast.ops.grouped_attention`."""
    _, num_slots, head_dim = q.shape
    block_d = max(16, triton.next_power_of_2(head_dim))
    kernel = tuned(_grouped_attention_kernel, CONFIGS[max(64, block_d)], q, ("HEAD_DIM",))

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (len(tiles) * (BLOCK_ROWS // meta["BLOCK_Q"]) * num_slots,)

    # exp2 instead of exp: the change of base is part of the factor, or of the cap.
    factor = scale * LOG2_E if softcap is None else scale / softcap
    kernel[grid](
        q, k, v, count, q_to_kv, tiles, out,
        num_slots, float(factor), float((softcap or 0.0) * LOG2_E),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        q_to_kv.stride(0), out.stride(0), out.stride(1),
        CAUSAL=causal, WINDOW=window or 0, HAS_SOFTCAP=softcap is not None,
        HEAD_DIM=head_dim, BLOCK_D=block_d, TILE_ROWS=BLOCK_ROWS,
    )  # fmt: skip
