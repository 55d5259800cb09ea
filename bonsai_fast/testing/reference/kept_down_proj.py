"""Down projection of kept channels, naively."""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.testing.reference._naive import output_projection, put_back


def kept_down_proj_reference(
    a: Tensor, weight_t: Tensor, keep: Tensor, row_group: Tensor,
    bias: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Kept channels put back in their places among zeros, then the whole projection.

    Args:
        a: [T, width], kept channels next to each other; float64 stays float64.
        weight_t: [I, N].
        keep: bool [K, I].
        row_group: int [T].
        bias: [N].
        residual: [T, N].

    Returns:
        [T, N] in the dtype of `a`.
    """
    return output_projection(put_back(a, keep, row_group), weight_t, bias, residual)
