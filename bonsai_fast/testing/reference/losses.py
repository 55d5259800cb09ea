"""Negative log-likelihood, naively."""

from __future__ import annotations

import torch
from torch import Tensor


def token_nll_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of one token per row.

        nll[n] = log sum_v exp(logits[n, v]) - logits[n, labels[n]]

    Args:
        logits: [N, V] float16, bfloat16 or float32; or float64, which is computed as such, so that
            the reference can be held to a truth of its own.
        labels: [N] int64 in 0..V-1.

    Returns:
        [N] float32 (float64 for float64 logits), in nats.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -logits.log_softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)


def lm_head_nll_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Negative log-likelihood of one token per row of hidden states, by way of all logits.

    Args:
        x: [T, H]; float64 is computed as such.
        weight: [V, H].
        labels: [T] int64 in 0..V-1.
        bias: [V].
        scale, softcap: of the logits.

    Returns:
        [T] float32 (float64 for float64 inputs), in nats.
    """
    logits = x @ weight.T if bias is None else x @ weight.T + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return token_nll_reference(logits, labels)
