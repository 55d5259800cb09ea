"""Output projection over kept heads, naively."""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.testing.reference._naive import output_projection, put_back


def kept_o_proj_reference(
    a: Tensor, weight: Tensor, keep: Tensor, row_group: Tensor,
    bias: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Kept heads put back in their places among zeros, then the whole projection.

    Args:
        a: [T, slots, D]; float64 stays float64.
        weight: [N, heads * D].
        keep: bool [K, heads].
        row_group: int [T].
        bias: [N].
        residual: [T, N].

    Returns:
        [T, N] in the dtype of `a`.
    """
    heads = put_back(a, keep, row_group)
    return output_projection(heads.flatten(1), weight.T, bias, residual)
