"""Output projection over each sub-model's kept heads, added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.ops._checks import check_floats, check_output_projection, check_weight
from bonsai_fast.ops._groups import add, group_rows
from bonsai_fast.ops._register import register


@register()
def kept_o_proj(
    a: Tensor, weight: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None = None, residual: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Output projection over each sub-model's kept heads, added to the residual stream.

        out[t] = residual[t] + bias + sum_c W[:, index[g, c]] a[t, c],  c < count[g]

    g is the sub-model of row t.

    Args:
        a: [T, slots, D] from `grouped_attention`, a row's slots next to each other; float16,
            bfloat16 or float32, D a multiple of 16. Slots from count[g] on are not read.
        weight: [N, heads * D] in the dtype of `a`, fewer than 2^31 elements.
        index, count, tiles: as for `kept_head_proj`.
        bias: [N] in the dtype of `a`.
        residual: [T, N] in the dtype of `a`.

    Returns:
        [T, N] in the dtype of `a`; kernels add up in float32.

    Raises:
        ValueError: an argument does not fit this description.
    """
    check_floats("a", a, "T", "slots", "D")
    head_dim, num_outputs = a.shape[2], weight.shape[0]
    if a.shape[1] > 1 and a.stride(1) != head_dim:
        raise ValueError(f"a must have its slots side by side, got strides {a.stride()}")
    if head_dim < 16 or head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    check_weight("weight", weight, a, None, None)
    if weight.shape[1] % head_dim:
        raise ValueError(f"weight must have whole heads of {head_dim}, got {list(weight.shape)}")
    rest = index, count, tiles, bias, residual
    check_output_projection(a, *rest, num_outputs=num_outputs, multiple=1)
    out = a.new_empty(a.shape[0], num_outputs)
    yield out
    out.zero_()
    heads = weight.unflatten(1, (-1, head_dim))
    for group, begin, end in group_rows(tiles):
        kept = index[group, : int(count[group])].long()
        out[begin:end] = F.linear(
            a[begin:end, : len(kept)].flatten(1, 2), heads[:, kept].flatten(1, 2)
        )
    add(out, bias, residual)
