"""Attention of each sub-model's kept heads over the tokens of each sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.ops._checks import check_floats, check_rows, check_softcap, check_tiles
from bonsai_fast.ops._register import register


@register()
def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, count: Tensor, q_to_kv: Tensor, tiles: Tensor,
    *, scale: float, causal: bool = True, window: int | None = None, softcap: float | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Attention of each sub-model's kept heads over the tokens of each sequence.

        out[t, c] = sum_s softmax_s(z[t, s]) v[s, q_to_kv[g, c]],  z = scale * q[t, c] . k[s, ...]

    g is the sub-model of row t. s runs over the tokens of the row's sequence, up to t if `causal`,
    and from t - window + 1 if there is a window. With a softcap z = softcap * tanh(z / softcap).
    Out is exactly 0 in slots from count[g] on, which are not read.

    Args:
        q: [T, slots, D] float16, bfloat16 or float32, D <= 256; any strides, contiguous along D.
        k, v: [T, kv_slots, D] in the dtype of `q`.
        count: int32 [K], query heads of each sub-model.
        q_to_kv: int32 [K, slots], the slot in `k` and `v` of each query slot.
        tiles: `SequencePlan.tiles`, int32 [num_tiles, 4], which cover all T rows. One sequence's
            part of a tensor spans fewer than 2^31 elements.
        scale: factor of the dot products.
        causal: whether a token sees only itself and earlier tokens.
        window: how many tokens a token sees, itself included (Mistral); causal only.
        softcap: bound of the scores (Gemma 2), positive.

    Returns:
        [T, slots, D] in the dtype of `q`, contiguous.

    Raises:
        ValueError: an argument does not fit this description.
    """
    check_floats("q", q, "T", "slots", "D")
    num_rows, num_slots, head_dim = q.shape
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim must be in 1..256, got {head_dim}")
    check_rows("k", k, q.dtype, q, num_rows, None, head_dim)
    check_rows("v", v, q.dtype, q, *k.shape)
    check_rows("count", count, torch.int32, q, None)
    check_rows("q_to_kv", q_to_kv, torch.int32, q, count.shape[0], num_slots)
    check_tiles(tiles, q, 4)
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be positive, and attention causal, got {window}")
    check_softcap(softcap)
    out = q.new_empty(q.shape)
    yield out
    out.zero_()
    for group, begin, end in sorted({(g, b, e) for g, _, b, e in tiles.tolist()}):
        kept = int(count[group])
        heads = q_to_kv[group, :kept].long()
        query = q[begin:end, :kept].transpose(0, 1)
        key, value = (tensor[begin:end, heads].transpose(0, 1) for tensor in (k, v))
        if not causal:
            mask = None
        else:
            position = torch.arange(end - begin, device=q.device)
            distance = position[:, None] - position
            mask = (distance >= 0) & (distance < (window or end - begin))
        if softcap is None:
            value = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        else:
            logits = (query @ key.transpose(1, 2)).float() * (scale / softcap)
            logits = logits.tanh_().mul_(softcap)
            if mask is not None:
                logits.masked_fill_(~mask, float("-inf"))
            value = logits.softmax(dim=-1).to(q.dtype) @ value
        out[begin:end, :kept] = value.transpose(0, 1)
