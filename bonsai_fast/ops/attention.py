"""Attention of many sub-models: the heads that each of them keeps, and no others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.kernels._checks import (
    INDEX_PADDING,
    check_grouped_attention,
    check_kept_head_proj,
    check_kept_o_proj,
)
from bonsai_fast.ops._groups import add, group_rows


@torch.library.custom_op("bonsai_fast::kept_head_proj", mutates_args=())
def kept_head_proj(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    head_dim: int,
    norm_eps: float = 0.0,
) -> Tensor:
    """Query, key or value projection of the heads that every row's sub-model needs.

        out[t, c] = rope(norm(x[t] . W[head] + b[head])),  head = index[g, c] for c < count[g]

    g is the sub-model of row t; out is exactly 0 beyond its heads. The norm divides a head by its
    root mean square; the rotation turns dims d and d + R/2 by the angle of the row's position and
    leaves dims from R on alone, as Hugging Face models do.

    Args:
        x: [T, H] float16, bfloat16 or float32, rows grouped by sub-model.
        weight: [heads * D, H] in the dtype of `x`, fewer than 2^31 elements.
        index, count: `KeptLists` of the heads: int32 [K, slots + 128] and [K].
        tiles: `RowPlan.tiles`, int32 [num_tiles, 3], which cover all T rows.
        bias: [heads * D] in the dtype of `x`.
        norm_weight: [D] in the dtype of `x`, a norm's factors.
        cos, sin: float32 [P, R/2], one row a position, R <= D even.
        positions: int64 [T] in 0..P-1.
        head_dim: D, even.
        norm_eps: what the norm adds to the mean square.

    Returns:
        [T, slots, D] in the dtype of `x`; kernels stay in float32 until the end.

    Raises:
        ValueError: an argument is none of these.
    """
    check_kept_head_proj(
        x, weight, index, count, tiles, bias, norm_weight, cos, sin, positions, head_dim
    )
    heads = weight.view(-1, head_dim, x.shape[1])
    out = x.new_zeros(len(x), index.shape[1] - INDEX_PADDING, head_dim)
    for group, begin, end in group_rows(tiles):
        kept = index[group, : int(count[group])].long()
        value = F.linear(
            x[begin:end],
            heads[kept].flatten(0, 1),
            None if bias is None else bias.view(-1, head_dim)[kept].flatten(),
        )
        value = value.float().view(end - begin, len(kept), head_dim)
        if norm_weight is not None:
            value = F.rms_norm(value, (head_dim,), norm_weight.float(), norm_eps)
        if cos is not None and sin is not None and positions is not None:
            rows = positions[begin:end]
            value = _rotate(value, cos[rows][:, None], sin[rows][:, None])
        out[begin:end, : len(kept)] = value
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    left, right, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)


@kept_head_proj.register_kernel("cuda")
def _kept_head_proj_cuda(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    head_dim: int,
    norm_eps: float = 0.0,
) -> Tensor:
    from bonsai_fast.kernels.kept_head_proj import kept_head_proj_triton

    norm_and_rope = (norm_weight, cos, sin, positions)
    return kept_head_proj_triton(
        x, weight, index, count, tiles, bias, *norm_and_rope, head_dim=head_dim, norm_eps=norm_eps
    )


@kept_head_proj.register_fake
def _kept_head_proj_fake(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    head_dim: int,
    norm_eps: float = 0.0,
) -> Tensor:
    check_kept_head_proj(
        x, weight, index, count, tiles, bias, norm_weight, cos, sin, positions, head_dim
    )
    return x.new_empty(x.shape[0], index.shape[1] - INDEX_PADDING, head_dim)


@torch.library.custom_op("bonsai_fast::grouped_attention", mutates_args=())
def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    q_to_kv: Tensor,
    tiles: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every sub-model's own heads over the tokens of each sequence.

        out[t, c] = sum_s softmax_s(z[t, s]) v[s, q_to_kv[g, c]],  z = scale * q[t, c] . k[s, ...]

    s runs over the tokens of the row's sequence, up to t where `causal`, and from t - window + 1
    where there is a window; z = softcap * tanh(z / softcap) with a softcap. Out is exactly 0 in
    slots from count[g] on, which are not read.

    Args:
        q: [T, slots, D] float16, bfloat16 or float32, D <= 256; any strides, contiguous along D.
        k, v: [T, kv_slots, D] in the dtype of `q`.
        count: int32 [K], query heads of every sub-model.
        q_to_kv: int32 [K, slots], the slot in `k` and `v` of every query slot.
        tiles: `SequencePlan.tiles`, int32 [num_tiles, 4], which cover all T rows. One sequence's
            part of a tensor spans fewer than 2^31 elements.
        scale: factor of the dot products.
        causal: whether tokens see earlier ones and themselves alone.
        window: how many tokens a token sees, itself included (Mistral); causal only.
        softcap: bound of the scores (Gemma 2), positive.

    Returns:
        [T, slots, D] in the dtype of `q`, contiguous.

    Raises:
        ValueError: an argument is none of these.
    """
    check_grouped_attention(q, k, v, count, q_to_kv, tiles, causal, window, softcap)
    out = q.new_zeros(q.shape)
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
    return out


@grouped_attention.register_kernel("cuda")
def _grouped_attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    q_to_kv: Tensor,
    tiles: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    from bonsai_fast.kernels.grouped_attention import grouped_attention_triton

    return grouped_attention_triton(
        *(q, k, v, count, q_to_kv, tiles),
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
    )


@grouped_attention.register_fake
def _grouped_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    q_to_kv: Tensor,
    tiles: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    check_grouped_attention(q, k, v, count, q_to_kv, tiles, causal, window, softcap)
    return q.new_empty(q.shape)


@torch.library.custom_op("bonsai_fast::kept_o_proj", mutates_args=())
def kept_o_proj(
    a: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Output projection over every sub-model's own heads, added to the residual stream.

        out[t] = residual[t] + bias + sum_c W[:, index[g, c]] a[t, c],  c < count[g]

    Args:
        a: [T, slots, D] from `grouped_attention`, slots side by side; float16, bfloat16 or float32,
            D a multiple of 16. Slots from count[g] on are not read.
        weight: [N, heads * D] in the dtype of `a`, fewer than 2^31 elements.
        index, count, tiles: as for `kept_head_proj`.
        bias: [N] in the dtype of `a`.
        residual: [T, N] in the dtype of `a`.

    Returns:
        [T, N] in the dtype of `a`; kernels add up in float32.

    Raises:
        ValueError: an argument is none of these.
    """
    check_kept_o_proj(a, weight, index, count, tiles, bias, residual)
    heads = weight.unflatten(1, (-1, a.shape[2]))
    out = a.new_zeros(len(a), len(weight))
    for group, begin, end in group_rows(tiles):
        kept = index[group, : int(count[group])].long()
        out[begin:end] = F.linear(
            a[begin:end, : len(kept)].flatten(1, 2), heads[:, kept].flatten(1, 2)
        )
    return add(out, bias, residual)


@kept_o_proj.register_kernel("cuda")
def _kept_o_proj_cuda(
    a: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    from bonsai_fast.kernels.kept_o_proj import kept_o_proj_triton

    return kept_o_proj_triton(a, weight, index, count, tiles, bias, residual)


@kept_o_proj.register_fake
def _kept_o_proj_fake(
    a: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_kept_o_proj(a, weight, index, count, tiles, bias, residual)
    return a.new_empty(a.shape[0], weight.shape[0])
