"""Query, key or value projection of the heads that each row's sub-model needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.kernels._sizes import INDEX_PADDING
from bonsai_fast.ops._checks import check_bias, check_floats, check_plan, check_rows, check_weight
from bonsai_fast.ops._groups import group_rows
from bonsai_fast.ops._register import register


@register()
def kept_head_proj(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None = None, norm_weight: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, positions: Tensor | None = None,
    *, head_dim: int, norm_eps: float = 0.0,
) -> Iterator[Tensor]:  # fmt: skip
    """Query, key or value projection of the heads that each row's sub-model needs.

        out[t, c] = rope(norm(x[t] . W[head] + b[head])),  head = index[g, c] for c < count[g]

    g is the sub-model of row t; out is exactly 0 from head count[g] on. The norm divides a head by
    its root mean square. The rotation turns dims d and d + R/2 by the angle of the row's position
    and leaves dims from R on unchanged, as Hugging Face models do.

    Args:
        x: [T, H] float16, bfloat16 or float32, rows grouped by sub-model.
        weight: [heads * D, H] in the dtype of `x`, fewer than 2^31 elements.
        index, count: `KeptLists` of the heads: int32 [K, slots + 128] and [K].
        tiles: `RowPlan.tiles`, int32 [num_tiles, 3], which cover all T rows.
        bias: [heads * D] in the dtype of `x`.
        norm_weight: [D] in the dtype of `x`, a norm's factors.
        cos, sin: float32 [P, R/2], one row per position, R <= D even.
        positions: int64 [T] in 0..P-1.
        head_dim: D, even.
        norm_eps: added to the mean square in the norm.

    Returns:
        [T, slots, D] in the dtype of `x`; kernels compute in float32.

    Raises:
        ValueError: an argument does not fit this description.
    """
    check_floats("x", x, "T", "H")
    check_weight("weight", weight, x, None, x.shape[1])
    if head_dim < 2 or head_dim % 2 or weight.shape[0] % head_dim:
        raise ValueError(
            f"head_dim must be even and divide the {len(weight)} rows of weight, got {head_dim}"
        )
    check_plan(x, index, count, tiles, multiple=1)
    check_bias(bias, x, weight.shape[0])
    if norm_weight is not None:
        check_rows("norm_weight", norm_weight, x.dtype, x, head_dim)
    _check_rotation(cos, sin, positions, x, head_dim)
    out = x.new_empty(x.shape[0], index.shape[1] - INDEX_PADDING, head_dim)
    yield out
    out.zero_()
    heads = weight.view(-1, head_dim, x.shape[1])
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


def _check_rotation(
    cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, x: Tensor, head_dim: int
) -> None:
    if cos is None and sin is None and positions is None:
        return
    if cos is None or sin is None or positions is None:
        raise ValueError("cos, sin and positions must come together")
    check_rows("cos", cos, torch.float32, x, None, None)
    if not 1 <= cos.shape[1] <= head_dim // 2:
        raise ValueError(f"cos must be [P, R / 2] with R in 2..{head_dim}, got {list(cos.shape)}")
    check_rows("sin", sin, torch.float32, x, *cos.shape)
    if sin.stride(0) != cos.stride(0):
        raise ValueError(f"sin must have the strides of cos, got {sin.stride()}")
    check_rows("positions", positions, torch.int64, x, x.shape[0])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [rows, heads, D] by angles of [rows, 1, R/2]."""
    half = cos.shape[-1]
    left, right, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)
