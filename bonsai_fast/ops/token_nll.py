"""Negative log-likelihood of one token per row of logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.ops._checks import check_floats, check_tensor
from bonsai_fast.ops._register import register

# Logits converted at a time by one thread: 1 MiB in float32, so that they stay in a core's cache.
BLOCK_LOGITS = 1 << 18


@register()
def token_nll(logits: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Negative log-likelihood of one token per row, in float32 without a float copy of the logits.

        nll[n] = log sum_v exp(logits[n, v]) - logits[n, labels[n]]

    Rows do not depend on each other: NaN stays in its row. Infinities mean the same as in
    `torch.nn.functional.cross_entropy`: -inf is a token that cannot occur (a label there gives
    +inf), and a row that holds +inf, or nothing but -inf, gives NaN.

    Args:
        logits: [N, V] float16, bfloat16 or float32, contiguous along V; rows may be strided.
        labels: [N] int64 in 0..V-1, on the same device.

    Returns:
        [N] float32, in nats.

    Raises:
        ValueError: an argument does not fit this description. A label out of range is an error on
            the CPU; on CUDA, where looking at labels would stall the stream, its row is NaN.
    """
    check_floats("logits", logits, "N", "V")
    num_rows, vocab_size = logits.shape
    if vocab_size == 0:
        raise ValueError(f"logits must be [N, V] with V >= 1, got {list(logits.shape)}")
    check_tensor("labels", labels, torch.int64, logits, num_rows)
    nll = logits.new_empty(num_rows, dtype=torch.float32)
    yield nll
    if num_rows == 0:
        return
    lowest, highest = (int(bound) for bound in labels.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"labels must be in 0..{vocab_size - 1}, got {lowest}..{highest}")
    # A multiple of the threads, because log_softmax gives each thread whole rows.
    num_block_rows = torch.get_num_threads() * max(1, BLOCK_LOGITS // vocab_size)
    for begin in range(0, num_rows, num_block_rows):
        rows = slice(begin, begin + num_block_rows)
        nll[rows] = F.cross_entropy(logits[rows].float(), labels[rows], reduction="none")
