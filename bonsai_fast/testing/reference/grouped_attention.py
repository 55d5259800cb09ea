"""Attention of many sub-models, naively: one query head of one sequence at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bonsai_fast.testing.reference._naive import wide


def grouped_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    q_to_kv: Tensor,
    lengths: list[int],
    groups: list[int],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention, one query head of one sequence at a time.

    Args:
        q: [T, slots, D]; float64 stays float64.
        k, v: [T, kv_slots, D].
        count: int [K].
        q_to_kv: int [K, slots].
        lengths, groups: tokens and sub-model of each sequence.
        scale: factor of the scores.
        causal: whether a token sees only itself and earlier tokens.
        window: how many tokens a token sees, itself included.
        softcap: bound of the scores.

    Returns:
        [T, slots, D] in the dtype of `q`.
    """
    out = torch.zeros_like(q)
    begin = 0
    for length, group in zip(lengths, groups, strict=True):
        rows = slice(begin, begin + length)
        begin += length
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= distance >= window
        for slot in range(int(count[group])):
            kv = int(q_to_kv[group, slot])
            logits = wide(q[rows, slot] @ k[rows, kv].T) * scale
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            weights = logits.masked_fill(hidden, -math.inf).softmax(dim=-1)
            out[rows, slot] = weights.to(q.dtype) @ v[rows, kv]
    return out
