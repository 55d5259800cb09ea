"""The MLP of many sub-models, naively: every channel is computed, then the masks select."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32, so that a reference does not round on the way; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activate_reference(x: Tensor, activation: str) -> Tensor:
    """The four activations by their formulas."""
    if activation == "silu":
        return x / (1 + (-x).exp())
    if activation == "gelu":
        return x * (1 + (x / math.sqrt(2)).erf()) / 2
    if activation == "gelu_tanh":
        return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2
    return torch.where(x < 0, torch.zeros_like(x), x)


def glu_mask_reference(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Tensor:
    """act(gate) * up where the row's sub-model keeps the channel, else 0.

    Args:
        gate_up: [T, 2I], gate then up; [T, I] where `gated` is False. float64 is computed as such.
        keep: bool [K, I].
        row_group: int [T].

    Returns:
        [T, I] in the dtype of `gate_up`.
    """
    value = activate_reference(wide(gate_up[:, : keep.shape[1]]), activation)
    if gated:
        value = value * wide(gate_up[:, keep.shape[1] :])
    zero = torch.zeros_like(value)
    return torch.where(keep[row_group.long()], value, zero).to(gate_up.dtype)


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
    """All channels of the MLP's first half, then every row's kept ones side by side.

    Args:
        x: [T, H]; float64 is computed as such.
        weight: [2I, H], gate then up; [I, H] where `gated` is False.
        keep: bool [K, I].
        row_group: int [T].
        bias: [2I] or [I].

    Returns:
        [T, width] in the dtype of `x`, zeros beyond what is kept.
    """
    projected = wide(x @ weight.T if bias is None else x @ weight.T + bias)
    value = activate_reference(projected[:, : keep.shape[1]], activation)
    if gated:
        value = value * projected[:, keep.shape[1] :]
    out = torch.zeros(len(x), width, dtype=value.dtype, device=x.device)
    for row, group in enumerate(row_group.tolist()):
        kept = value[row, keep[group]]
        out[row, : len(kept)] = kept
    return out.to(x.dtype)


def kept_down_proj_reference(
    a: Tensor,
    weight_t: Tensor,
    keep: Tensor,
    row_group: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Kept channels put back in their places among zeros, then the whole projection.

    Args:
        a: [T, width], kept channels side by side; float64 is computed as such.
        weight_t: [I, N].
        keep: bool [K, I].
        row_group: int [T].
        bias: [N].
        residual: [T, N].

    Returns:
        [T, N] in the dtype of `a`.
    """
    dense = torch.zeros(len(a), len(weight_t), dtype=a.dtype, device=a.device)
    for row, group in enumerate(row_group.tolist()):
        dense[row, keep[group]] = a[row, : int(keep[group].sum())]
    out = wide(dense @ weight_t)
    for term in (bias, residual):
        if term is not None:
            out = out + term
    return out.to(a.dtype)
