"""Causal attention of many short sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast import ops

# query tokens in a block on a CPU: small blocks compute little above the diagonal
BLOCK_TOKENS = 64


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    window: int | None = None,
    softcap: float | None = None,
    kernels: bool = False,
) -> Tensor:
    """Softmax attention; every KV head is shared by H / Hkv consecutive query heads.

    Args:
        query: [R, H, T, K].
        key, value: [R, Hkv, T, K].
        scale: factor of the scores.
        mask: bool [T, T], True where a token (row) attends to another; None: causal.
        window: how many tokens a token attends to, itself included, as `mask` says; None: all
            before it.
        softcap: scores are softcap * tanh(scores / softcap); None: they have no bound.
        kernels: whether a softcap is applied by the project's op, which is a kernel on CUDA.
    Returns:
        [R, T, H * K], contiguous.
    """
    rows, heads, length, _ = query.shape
    if softcap is not None:  # PyTorch's fused attention has none
        if kernels:
            return _by_op(query, key, value, scale, window, softcap)
        return _by_blocks(query, key, value, scale, window, softcap)
    # in 16 bits, PyTorch's CPU kernel runs at half the speed of batched products
    if query.device.type == "cpu" and query.element_size() == 2 and mask is None:
        return _by_blocks(query, key, value, scale)
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != heads,
    )
    return attended.transpose(1, 2).reshape(rows, length, -1)


def _by_op(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float
) -> Tensor:
    """The same by op `grouped_attention`, with all rows in one group."""
    rows, heads, length, width = query.shape
    device = query.device
    tokens = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    plan = ops.SequencePlan.of([length] * rows, [0] * rows, device=device)
    count = torch.tensor([heads], dtype=torch.int32, device=device)
    head = torch.arange(heads, dtype=torch.int32, device=device)
    q_to_kv = (head // (heads // key.shape[1]))[None]
    found: Tensor = ops.grouped_attention(
        *(*tokens, count, q_to_kv, plan.tiles), scale=scale, window=window, softcap=softcap
    )
    return found.view(rows, length, heads * width)


def _by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Multiply blocks of queries with all keys that they attend to, in batched products."""
    rows, heads, length, width = query.shape
    shared = heads // key.shape[1]
    grouped = query.reshape(-1, shared, length, width)  # [R * Hkv, H / Hkv, T, K]
    keys = key.reshape(-1, length, width).transpose(1, 2)
    values = value.reshape(-1, length, width)
    out = query.new_empty(rows, length, heads, width)
    # [R, Hkv, H / Hkv, T, K]
    target = out.view(rows, length, -1, shared, width).permute(0, 2, 3, 1, 4)
    unseen = torch.ones(BLOCK_TOKENS, BLOCK_TOKENS, dtype=torch.bool, device=query.device).triu(1)
    for begin in range(0, length, BLOCK_TOKENS):
        end = min(begin + BLOCK_TOKENS, length)
        first = 0 if window is None else max(0, begin - window + 1)
        count = end - begin
        block = grouped[:, :, begin:end].reshape(-1, shared * count, width)
        read = keys[..., first:end]
        scores = torch.baddbmm(block.new_empty(()), block, read, beta=0, alpha=scale)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        by_head = scores.view(-1, shared, count, end - first)
        by_head[..., begin - first :].masked_fill_(unseen[:count, :count], -torch.inf)
        if window is not None:
            place = torch.arange(end, device=query.device)
            too_old = place[begin:, None] - place[None, first:] >= window
            by_head.masked_fill_(too_old, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        attended = torch.bmm(weights, values[:, first:end])
        target[..., begin:end, :] = attended.view(rows, -1, shared, count, width)
    return out.view(rows, length, -1)
