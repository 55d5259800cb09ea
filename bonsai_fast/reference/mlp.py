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
