"""Causal attention of many short sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# query tokens in a block on a CPU: small blocks compute little above the diagonal
BLOCK_TOKENS = 64


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None
) -> Tensor:
    """Softmax attention; every KV head is shared by H / Hkv consecutive query heads.

    Args:
        query: [R, H, T, K].
        key, value: [R, Hkv, T, K].
        scale: factor of the scores.
        mask: bool [T, T], True where a token (row) attends to another; None: causal.
    Returns:
        [R, T, H * K], contiguous.
    """
    rows, heads, length, _ = query.shape
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


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
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
        count = end - begin
        block = grouped[:, :, begin:end].reshape(-1, shared * count, width)
        scores = torch.baddbmm(block.new_empty(()), block, keys[..., :end], beta=0, alpha=scale)
        diagonal = scores.view(-1, shared, count, end)[..., begin:]
        diagonal.masked_fill_(unseen[:count, :count], -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        attended = torch.bmm(weights, values[:, :end])
        target[..., begin:end, :] = attended.view(rows, -1, shared, count, width)
    return out.view(rows, length, -1)
