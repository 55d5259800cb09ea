"""Down projection of kept channels, added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bonsai_fast.kernels._sizes import INDEX_PADDING
from bonsai_fast.ops._checks import check_floats, check_output_projection, check_weight
from bonsai_fast.ops._groups import add, group_rows
from bonsai_fast.ops._register import register


@register()
def kept_down_proj(
    a: Tensor, weight_t: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None = None, residual: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Down projection of kept channels, added to the residual stream.

        out[t, n] = residual[t, n] + bias[n] + sum_c a[t, c] * W[index[g, c], n],  c < count[g]

    g is the sub-model of row t.

    Args:
        a: [T, width] from `kept_up_proj`, float16, bfloat16 or float32: zero from count[g] to the
            next multiple of 128, not read beyond.
        weight_t: [I, N], the transposed weight, contiguous along N, in the dtype of `a`; fewer than
            2^31 elements.
        index, count, tiles: as for `kept_up_proj`.
        bias: [N] in the dtype of `a`.
        residual: [T, N] in the dtype of `a`.

    Returns:
        [T, N] in the dtype of `a`; kernels add up in float32.

    Raises:
        ValueError: an argument does not fit this description.
    """
    check_floats("a", a, "T", "width")
    check_weight("weight_t", weight_t, a, None, None)
    num_outputs = weight_t.shape[1]
    rest = index, count, tiles, bias, residual
    check_output_projection(a, *rest, num_outputs=num_outputs, multiple=INDEX_PADDING)
    out = a.new_empty(a.shape[0], num_outputs)
    yield out
    out.zero_()
    for group, begin, end in group_rows(tiles):
        kept = index[group, : int(count[group])].long()
        out[begin:end] = a[begin:end, : len(kept)] @ weight_t[kept]
    add(out, bias, residual)
