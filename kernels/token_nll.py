"""Negative log-likelihood of one token per row of logits, in a single pass over the vocabulary.

    nll[n] = log sum_v exp(logits[n, v]) - logits[n, labels[n]]

logits [N, V], labels [N] -> nll [N] float32, nats. Every logit is read once, in its own dtype, and
nothing but the result is written: 2 bytes per bfloat16 logit. The straightforward
`cross_entropy(logits.float(), labels, reduction="none")` moves at least 14 (read, write a float
copy, read it, write log-probabilities) and holds two float [N, V] tensors.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import tunable

# 16 elements are at least 128 bits in every dtype, the widest load there is.
ALIGNMENT = tl.constexpr(16)
LOG2_E = tl.constexpr(math.log2(math.e))
# Running maxima start at a finite number: with -inf, all -inf would give -inf - (-inf) = NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _fold(x, peak, total):
    """Fold a tile into each lane's running maximum and sum, with one exponential a logit."""
    distance = x - peak
    # exp2 flushes denormals; exp would spend three instructions on keeping them.
    scale = tl.exp2(-tl.abs(distance) * LOG2_E)
    total = tl.where(distance > 0, total * scale + 1.0, total + scale)
    return tl.maximum(peak, x), total


# Default by reasoning, not yet by measurement: no spill, at least 32 bytes in flight a thread and
# 768 threads an SM on sm_80, sm_86 and sm_90 (see tests/ops/test_aot.py).
@triton.autotune(
    configs=tunable(
        triton.Config({"BLOCK_V": 2048}, num_warps=4),
        triton.Config({"BLOCK_V": 1024}, num_warps=4),
        triton.Config({"BLOCK_V": 4096}, num_warps=8),
        triton.Config({"BLOCK_V": 8192}, num_warps=16),
    ),
    key=["V"],
)
@triton.jit
def _token_nll_kernel(
    logits_ptr, labels_ptr, nll_ptr,                     # [N, V], [N] -> [N]
    V,
    stride_ln,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = row * stride_ln
    # Tiles start on a boundary, so that full tiles load 128 bits at a time for odd V too.
    start = first // ALIGNMENT * ALIGNMENT
    skew = (first - start).to(tl.int32)
    stop = skew + V
    offs = tl.arange(0, BLOCK_V)
    tile_ptrs = logits_ptr + start + offs

    # Lanes are combined only at the end: no barrier in the loop.
    peak = tl.full([BLOCK_V], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)

    x = tl.load(tile_ptrs, mask=(offs >= skew) & (offs < stop), other=-float("inf"))
    peak, total = _fold(x.to(tl.float32), peak, total)
    for begin in range(BLOCK_V, stop - BLOCK_V + 1, BLOCK_V):
        x = tl.load(tile_ptrs + begin)
        peak, total = _fold(x.to(tl.float32), peak, total)
    tail = tl.maximum(stop // BLOCK_V, 1) * BLOCK_V
    x = tl.load(tile_ptrs + tail, mask=tail + offs < stop, other=-float("inf"))
    peak, total = _fold(x.to(tl.float32), peak, total)

    row_peak = tl.max(peak, axis=0)
    row_total = tl.sum(total * tl.exp(peak - row_peak), axis=0)

    label = tl.load(labels_ptr + row)
    # A label out of range must not be followed: it gives NaN.
    in_range = (label >= 0) & (label < V)
    label_logit = tl.load(logits_ptr + first + label, mask=in_range, other=float("nan"))
    # The two large terms cancel first.
    tl.store(nll_ptr + row, tl.log(row_total) + (row_peak - label_logit.to(tl.float32)))


def token_nll_triton(logits: Tensor, labels: Tensor, out: Tensor) -> None:
    """Launch the kernel; the arguments and `out` are those of `bonsai_fast.ops.token_nll`.

    A label out of range gives NaN in its row: looking at labels would stall the stream.
    """
    num_rows, vocab_size = logits.shape
    _token_nll_kernel[(num_rows,)](
        logits, labels.contiguous(), out,
        vocab_size,
        logits.stride(0),
    )  # fmt: skip
