"""Attention with rotary positions before its output projection, by matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.causal_attention import attention
from bonsai_fast.scoring.fused.operands.operands import AttentionOperands
from bonsai_fast.scoring.fused.parent import Rotary
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
    query, key, value = (out.view(rows, length, -1) for out in outs)
    if spec.norms_all_heads:
        query = arithmetic.normalize(spec.query_norm, query, "normed query")
        key = arithmetic.normalize(spec.key_norm, key, "normed key")
    query, key, value = (part.unflatten(-1, (-1, spec.head_dim)) for part in (query, key, value))
    if not spec.norms_all_heads and not spec.norms_last:
        query = arithmetic.normalize(spec.query_norm, query, "normed query")
        key = arithmetic.normalize(spec.key_norm, key, "normed key")
    query = _turn("first", query, spec.rotary, positions, arithmetic)
    key = _turn("rotated key", key, spec.rotary, positions, arithmetic)
    if spec.norms_last:
        query = arithmetic.normalize(spec.query_norm, query, "normed query")
        key = arithmetic.normalize(spec.key_norm, key, "normed key")
    factors = positions.query_factors(spec.query_growth)
    if factors is not None:
        query.mul_(factors[:, None])
    value = value.transpose(1, 2)
    if not operands.is_regular:
        heads = torch.tensor(operands.kv_of_head, device=key.device)
        key, value = key.index_select(1, heads), value.index_select(1, heads)
    return attention(
        *(query, key, value),
        scale=spec.scale,
        mask=positions.mask(spec.window),
        window=spec.window,
        softcap=spec.softcap,
        kernels=arithmetic.kernels,
    )


def _turn(
    name: str, heads: Tensor, rotary: Rotary | None, positions: Positions, arithmetic: Arithmetic
) -> Tensor:
    """Rotary positions: [R, T, H, K] -> [R, H, T, K], in the buffer of this name.

    Columns that were interleaved end up in two halves: scores do not depend on the order of columns
    if query and key have the same.
    """
    heads = heads.transpose(1, 2)
    if rotary is None:
        return heads
    out = arithmetic.buffer(name, *heads.shape)
    cos, sin = positions.angles(rotary)
    half = cos.shape[-1]
    if rotary.interleaved:
        first, second = heads[..., : 2 * half : 2], heads[..., 1 : 2 * half : 2]
    else:
        first, second = heads[..., :half], heads[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :].copy_(heads[..., 2 * half :])
    return out
