"""Negative log-likelihood of tokens from logits, naively."""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.testing.reference._naive import wide


def token_nll_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of one token per row.

        nll[n] = log sum_v exp(logits[n, v]) - logits[n, labels[n]]

    Args:
        logits: [N, V] float16, bfloat16 or float32; or float64, which stays float64, so that the
            reference itself can be compared with a more exact one.
        labels: [N] int64 in 0..V-1.

    Returns:
        [N] float32 (float64 for float64 logits), in nats.
    """
    return -wide(logits).log_softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)
