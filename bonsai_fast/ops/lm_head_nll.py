"""Negative log-likelihood of one token per row of hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.ops._checks import check_bias, check_floats, check_rows, check_softcap
from bonsai_fast.ops._register import register
from bonsai_fast.ops.token_nll import BLOCK_LOGITS, token_nll

# Rows over which one reading of the LM head pays off.
MIN_BLOCK_ROWS = 256


@register()
def lm_head_nll(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None,
    *, scale: float = 1.0, softcap: float | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Negative log-likelihood of one token per row, from hidden states: no [T, V] tensor exists.

        z = scale * (x @ W.T + bias);  with a softcap, z = softcap * tanh(z / softcap)
        nll[t] = log sum_v exp(z[t, v]) - z[t, labels[t]]

    Rows do not depend on each other, and results are the same from run to run. Infinities are as in
    `token_nll`.

    Args:
        x: [T, H] float16, bfloat16 or float32, last hidden states after the final norm.
        weight: [V, H] in the dtype of `x`.
        labels: [T] int64 in 0..V-1.
        bias: [V] in the dtype of `x`.
        scale: factor of the logits.
        softcap: bound of the logits (Gemma 2), positive.

    Returns:
        [T] float32, in nats. On CUDA logits are float32 throughout; the CPU path rounds them to the
        dtype of `x`, as the model does.

    Raises:
        ValueError: an argument does not fit this description. A label out of range is an error on
            the CPU; on CUDA, where looking at labels would stall the stream, its row is NaN.
    """
    check_floats("x", x, "T", "H")
    check_rows("weight", weight, x.dtype, x, None, x.shape[1])
    if weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, H] with V >= 1, got {list(weight.shape)}")
    check_rows("labels", labels, torch.int64, x, x.shape[0])
    check_bias(bias, x, weight.shape[0])
    check_softcap(softcap)
    nll = x.new_empty(x.shape[0], dtype=torch.float32)
    yield nll
    # With so few rows that their logits fit a cache, reading the LM head would dominate.
    num_block_rows = max(MIN_BLOCK_ROWS, BLOCK_LOGITS * torch.get_num_threads() // len(weight))
    for begin in range(0, len(x), num_block_rows):
        rows = slice(begin, begin + num_block_rows)
        logits = F.linear(x[rows], weight, bias)
        if scale != 1.0:
            logits *= scale
        if softcap is not None:
            logits = logits.float().div_(softcap).tanh_().mul_(softcap)
        nll[rows] = token_nll(logits, labels[rows])
