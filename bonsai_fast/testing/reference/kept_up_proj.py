"""Up projection of kept channels, naively: all channels are computed, then the masks select."""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.testing.reference._naive import activate_reference, pick_kept, wide


def kept_up_proj_reference(
    x: Tensor,
    weight: Tensor,
    keep: Tensor,
    row_group: Tensor,
    bias: Tensor | None = None,
    *,
    width: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """All channels of the MLP's first half, then each row's kept ones next to each other.

    Args:
        x: [T, H]; float64 stays float64.
        weight: [2I, H], gate then up; [I, H] if not `gated`.
        keep: bool [K, I].
        row_group: int [T].
        bias: [2I] or [I].
        width: columns of the result.

    Returns:
        [T, width] in the dtype of `x`, zeros after the kept channels.
    """
    projected = wide(x @ weight.T if bias is None else x @ weight.T + bias)
    value = activate_reference(projected[:, : keep.shape[1]], activation)
    if gated:
        value = value * projected[:, keep.shape[1] :]
    return pick_kept(value, keep, row_group, width).to(x.dtype)
