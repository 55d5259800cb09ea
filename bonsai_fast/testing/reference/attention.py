"""Attention of many sub-models, naively: every head is computed, then each row's are picked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bonsai_fast.testing.reference.mlp import wide


def kept_head_proj_reference(
    x: Tensor,
    weight: Tensor,
    keep: Tensor,
    row_group: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    num_slots: int,
    norm_eps: float = 0.0,
) -> Tensor:
    """The projection of all heads, normed and rotated, then every row's heads side by side.

    Args:
        x: [T, H]; float64 is computed as such.
        weight: [heads * D, H].
        keep: bool [K, heads].
        row_group: int [T].
        bias: [heads * D].
        norm_weight: [D].
        cos, sin: [P, R/2].
        positions: int64 [T].

    Returns:
        [T, num_slots, D] in the dtype of `x`, zeros beyond a row's heads.
    """
    projected = x @ weight.T if bias is None else x @ weight.T + bias
    heads = wide(projected).view(len(x), keep.shape[1], -1)
    if norm_weight is not None:
        mean_square = heads.square().mean(dim=-1, keepdim=True)
        heads = heads / (mean_square + norm_eps).sqrt() * norm_weight
    if cos is not None and sin is not None:
        half = cos.shape[1]
        left, right = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
        cosine, sine = cos[positions][:, None], sin[positions][:, None]
        heads[..., :half] = left * cosine - right * sine
        heads[..., half : 2 * half] = right * cosine + left * sine
    out = torch.zeros(len(x), num_slots, heads.shape[2], dtype=x.dtype, device=x.device)
    for row, group in enumerate(row_group.tolist()):
        out[row, : int(keep[group].sum())] = heads[row, keep[group]].to(x.dtype)
    return out


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
        q: [T, slots, D]; float64 is computed as such.
        k, v: [T, kv_slots, D].
        count: int [K].
        q_to_kv: int [K, slots].
        lengths, groups: tokens and sub-model of every sequence.

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


def kept_o_proj_reference(
    a: Tensor,
    weight: Tensor,
    keep: Tensor,
    row_group: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Kept heads put back in their places among zeros, then the whole projection.

    Args:
        a: [T, slots, D]; float64 is computed as such.
        weight: [N, heads * D].
        keep: bool [K, heads].
        row_group: int [T].
        bias: [N].
        residual: [T, N].

    Returns:
        [T, N] in the dtype of `a`.
    """
    dense = torch.zeros(len(a), keep.shape[1], a.shape[2], dtype=a.dtype, device=a.device)
    for row, group in enumerate(row_group.tolist()):
        dense[row, keep[group]] = a[row, : int(keep[group].sum())]
    out = wide(dense.flatten(1) @ weight.T)
    for term in (bias, residual):
        if term is not None:
            out = out + term
    return out.to(a.dtype)
