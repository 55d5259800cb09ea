"""Negative log-likelihood of tokens from hidden states, naively."""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.testing.reference._naive import wide
from bonsai_fast.testing.reference.token_nll import token_nll_reference


def lm_head_nll_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Negative log-likelihood of one token per row of hidden states, from all logits.

    Args:
        x: [T, H]; float64 stays float64.
        weight: [V, H].
        labels: [T] int64 in 0..V-1.
        bias: [V].
        scale, softcap: of the logits.

    Returns:
        [T] float32 (float64 for float64 inputs), in nats.
    """
    logits = x @ weight.T if bias is None else x @ weight.T + bias
    logits = wide(logits) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return token_nll_reference(logits, labels)
