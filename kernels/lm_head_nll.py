"""Negative log-likelihoods straight from hidden states: no logit is ever written.

    z[v]   = cap * tanh(scale * (x[t] . W[v] + b[v]) / cap)         (without cap: no tanh)
    nll[t] = log sum_v exp(z[v]) - z[labels[t]]

x [T, H], W [V, H], labels [T] -> nll [T] float32, nats. A first kernel computes a tile of logits
and stores each row's maximum and sum of exponentials in a buffer, and the label's logit if the tile
has the label. A second kernel combines the V / BLOCK_N entries of each row in a fixed order. There
are no atomic additions: results are the same to the last bit from run to run. The buffer takes 8
bytes per row and tile instead of 2 to 4 per logit, and logits stay in float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import tile, tuned
from bonsai_fast.kernels._sizes import BLOCK_ROWS
from bonsai_fast.kernels._tiles import LOWEST, ROW_TILES_ABREAST, multiply, tanh

LOG2_E = tl.constexpr(math.log2(math.e))
# Compiled ahead of time, not yet timed on a GPU: no spill in the loop (tests/ops/test_aot.py).
CONFIGS = {
    ("ampere", 2): (tile(256, 32, 8, 4), tile(128, 32, 4, 4)),
    ("hopper", 2): (tile(256, 64, 8, 4), tile(128, 64, 8, 4)),
    ("ampere", 4): (tile(64, 32, 8, 3),),
    ("hopper", 4): (tile(64, 32, 4, 3),),
}
# Every BLOCK_K above divides it.
DEEPEST = 64
# Rows whose partial results are held at once: 64 MiB for a vocabulary of 128k in tiles of 256.
MAX_ROWS = 16384
COMBINE_ROWS = 128


@triton.jit(do_not_specialize=["num_rows"])
def _lm_head_nll_partial_kernel(
    x_ptr, weight_ptr, bias_ptr, labels_ptr, peaks_ptr, totals_ptr, label_logits_ptr,
    num_rows, hidden_size, vocab_size, scale, softcap,
    stride_xt, stride_wv, stride_pv,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_rows, BLOCK_T)
    pid = tl.program_id(0)
    band = ROW_TILES_ABREAST * tl.cdiv(vocab_size, BLOCK_N)
    first = pid // band * ROW_TILES_ABREAST
    height = tl.minimum(num_tiles - first, ROW_TILES_ABREAST)
    begin = (first + pid % band % height) * BLOCK_T
    column = pid % band // height

    offs_t = tl.arange(0, BLOCK_T)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    num_left = vocab_size - column * BLOCK_N
    # Rows past the end repeat the last one: no mask in the loop.
    x_offs = tl.minimum(offs_t, num_rows - begin - 1)[:, None] * stride_xt + offs_k[None, :]
    weight_offs = tl.minimum(offs_n, num_left - 1)[None, :] * stride_wv + offs_k[:, None]
    x_base = x_ptr + begin.to(tl.int64) * stride_xt
    # V * H passes 2^31 with large vocabularies: 64 bits for the tile, 32 inside.
    weight_base = weight_ptr + column.to(tl.int64) * BLOCK_N * stride_wv

    logits = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    logits = multiply(
        logits, x_base, x_offs, weight_base, weight_offs,
        hidden_size, hidden_size, offs_k, EVEN_K, BLOCK_K,
    )  # fmt: skip

    if HAS_BIAS:
        bias_ptrs = bias_ptr + column * BLOCK_N + offs_n
        bias = tl.load(bias_ptrs, mask=offs_n < num_left, other=0.0)
        logits += bias.to(tl.float32)[None, :]
    logits *= scale
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    logits = tl.where((offs_n < num_left)[None, :], logits, -float("inf"))
    # A finite peak: in rows of -inf, -inf - (-inf) would be NaN.
    peak = tl.maximum(tl.max(logits, axis=1), LOWEST)
    total = tl.sum(tl.exp2((logits - peak[:, None]) * LOG2_E), axis=1)

    rows = begin + offs_t
    inside = rows < num_rows
    partial = column.to(tl.int64) * stride_pv + rows
    tl.store(peaks_ptr + partial, peak, mask=inside)
    tl.store(totals_ptr + partial, total, mask=inside)
    label = tl.load(labels_ptr + rows, mask=inside, other=-1) - column.to(tl.int64) * BLOCK_N
    is_label = offs_n[None, :] == label[:, None]
    label_logit = tl.sum(tl.where(is_label, logits, 0.0), axis=1)
    owns = inside & (label >= 0) & (label < tl.minimum(num_left, BLOCK_N))
    tl.store(label_logits_ptr + rows, label_logit, mask=owns)


@triton.jit(do_not_specialize=["num_rows", "num_partials"])
def _lm_head_nll_combine_kernel(
    peaks_ptr, totals_ptr, label_logits_ptr, nll_ptr,    # [num_partials, T] twice, [T] -> [T]
    num_rows, num_partials,
    stride_pv,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < num_rows
    peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    offs = rows.to(tl.int64)
    for _ in range(num_partials):
        new_peak = tl.load(peaks_ptr + offs, mask=inside, other=LOWEST)
        new_total = tl.load(totals_ptr + offs, mask=inside, other=0.0)
        distance = new_peak - peak
        shrink = tl.exp2(-tl.abs(distance) * LOG2_E)
        rises = distance > 0
        total = tl.where(rises, total * shrink + new_total, total + new_total * shrink)
        peak = tl.maximum(peak, new_peak)
        offs += stride_pv
    label_logit = tl.load(label_logits_ptr + rows, mask=inside)
    # The two large terms cancel first.
    tl.store(nll_ptr + rows, tl.log(total) + (peak - label_logit), mask=inside)


def lm_head_nll_triton(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
    scale: float, softcap: float | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Launch both kernels; the arguments and `out` are those of `bonsai_fast.ops.lm_head_nll`.

    A label out of range gives NaN in its row: looking at labels would stall the stream.
    """
    num_rows, (vocab_size, hidden_size) = len(x), weight.shape
    # A label's tile writes its logit. Where no tile does, the label is out of range.
    label_logits = torch.full_like(out, math.nan)
    kernel = tuned(_lm_head_nll_partial_kernel, CONFIGS, x, ("hidden_size", "vocab_size"))
    narrowest = min(config.kwargs["BLOCK_N"] for config in kernel.configs)
    height = triton.cdiv(vocab_size, narrowest)
    # A multiple of BLOCK_ROWS, so that another number of rows does not compile again.
    stride = triton.cdiv(min(num_rows, MAX_ROWS), BLOCK_ROWS) * BLOCK_ROWS
    peaks, totals = torch.empty((2, height, stride), dtype=torch.float32, device=x.device)
    for begin in range(0, num_rows, MAX_ROWS):
        rows = slice(begin, begin + MAX_ROWS)
        num = len(x[rows])

        def grid(meta: dict[str, int], num: int = num) -> tuple[int]:
            return (triton.cdiv(num, BLOCK_ROWS) * triton.cdiv(vocab_size, meta["BLOCK_N"]),)

        kernel[grid](
            x[rows], weight, bias, labels[rows], peaks, totals, label_logits[rows],
            num, hidden_size, vocab_size, float(scale), float(softcap or 1.0),
            x.stride(0), weight.stride(0), stride,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            BLOCK_T=BLOCK_ROWS, EVEN_K=hidden_size % DEEPEST == 0,
        )  # fmt: skip
        num_partials = triton.cdiv(vocab_size, kernel.best_config.kwargs["BLOCK_N"])
        _lm_head_nll_combine_kernel[(triton.cdiv(num, COMBINE_ROWS),)](
            peaks, totals, label_logits[rows], out[rows],
            num, num_partials,
            stride,
            BLOCK_T=COMBINE_ROWS, num_warps=4, num_stages=4,
        )  # fmt: skip
