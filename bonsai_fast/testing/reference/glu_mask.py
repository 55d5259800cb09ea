"""Activation and channel masks, naively."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.testing.reference._naive import activate_reference, wide


def glu_mask_reference(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Tensor:
    """act(gate) * up where the row's sub-model keeps the channel, else 0.

    Args:
        gate_up: [T, 2I], gate then up; [T, I] if not `gated`. float64 stays float64.
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
