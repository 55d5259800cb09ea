"""Up projection and activation of the channels that each row's sub-model keeps."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.kernels._sizes import INDEX_PADDING
from bonsai_fast.ops._checks import (
    check_activation,
    check_bias,
    check_floats,
    check_plan,
    check_weight,
)
from bonsai_fast.ops._groups import activate, group_rows
from bonsai_fast.ops._register import register


@register()
def kept_up_proj(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None = None,
    *, activation: str, gated: bool,
) -> Iterator[Tensor]:  # fmt: skip
    """Up projection and activation of the channels that each row's sub-model keeps.

        out[t, c] = act(x[t] . W[i] + b[i]) * (x[t] . W[I + i] + b[I + i])
        i = index[g, c] for c < count[g], g the sub-model of row t; out is 0 from count[g] on

    Args:
        x: [T, H] float16, bfloat16 or float32, rows grouped by sub-model.
        weight: [2I, H], gate rows then up rows, in the dtype of `x`, fewer than 2^31 elements.
            Where `gated` is False: [I, H], and out is act of the one projection.
        index, count: `KeptLists` of the channels, with a multiple of 128: int32 [K, width + 128]
            and [K].
        tiles: `RowPlan.tiles`, int32 [num_tiles, 3], which cover all T rows.
        bias: [2I] or [I] in the dtype of `x`.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: whether the MLP has a gate.

    Returns:
        [T, width] in the dtype of `x`; kernels add up in float32.

    Raises:
        ValueError: an argument does not fit this description.
    """
    check_activation(activation)
    check_floats("x", x, "T", "H")
    check_weight("weight", weight, x, None, x.shape[1])
    num_channels = weight.shape[0] // (2 if gated else 1)
    if gated and weight.shape[0] % 2:
        raise ValueError(f"weight must be [2I, H], gate then up, got {list(weight.shape)}")
    check_plan(x, index, count, tiles, multiple=INDEX_PADDING)
    check_bias(bias, x, weight.shape[0])
    out = x.new_empty(x.shape[0], index.shape[1] - INDEX_PADDING)
    yield out
    out.zero_()
    for group, begin, end in group_rows(tiles):
        kept = index[group, : int(count[group])].long()

        def project(rows: Tensor, x: Tensor = x[begin:end]) -> Tensor:
            return F.linear(x, weight[rows], None if bias is None else bias[rows]).float()

        value = activate(project(kept), activation)
        if gated:
            value *= project(num_channels + kept)
        out[begin:end, : len(kept)] = value
