"""Attention with rotary positions before its output projection, by matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.causal_attention import attention
from bonsai_fast.scoring.fused.operands.operands import AttentionOperands
from bonsai_fast.scoring.fused.positions import Positions


def attend(
    operands: AttentionOperands, normed: Tensor, positions: Positions, arithmetic: Arithmetic
) -> Tensor:
    """The outputs of all heads.

    Args:
        operands: weights.
        normed: [R, T, D], contiguous.
        positions: of T tokens.
        arithmetic: computes the products.
    Returns:
        A new tensor [R, T, heads * head_dim].
    """
    spec = operands.spec
    rows, length, _ = normed.shape
    parts = {"second": operands.query, "key": operands.key, "value": operands.value}
    outs = [
        arithmetic.buffer(name, rows * length, len(part.weight)) for name, part in parts.items()
    ]
    arithmetic.project(normed, list(parts.values()), operands.weights, outs)
    query, key, value = (out.view(rows, length, -1, spec.block.head_dim) for out in outs)
    if spec.query_norm is not None:
        query = arithmetic.normalize(spec.query_norm, query, "normed query")
    if spec.key_norm is not None:
        key = arithmetic.normalize(spec.key_norm, key, "normed key")
    query = _rotate("first", query, positions, arithmetic)
    key = _rotate("rotated key", key, positions, arithmetic)
    value = value.transpose(1, 2)
    if not operands.is_regular:
        heads = torch.tensor(operands.kv_of_head, device=key.device)
        key, value = key.index_select(1, heads), value.index_select(1, heads)
    return attention(query, key, value, scale=spec.scale, mask=positions.mask(spec.window))


def _rotate(name: str, heads: Tensor, positions: Positions, arithmetic: Arithmetic) -> Tensor:
    """Rotary positions: [R, T, H, K] -> [R, H, T, K], in the buffer of this name."""
    rows, length, num_heads, head_dim = heads.shape
    out = arithmetic.buffer(name, rows, num_heads, length, head_dim)
    heads = heads.transpose(1, 2)
    cos, sin = positions.cos, positions.sin
    half = cos.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :].copy_(heads[..., 2 * half :])
    return out
