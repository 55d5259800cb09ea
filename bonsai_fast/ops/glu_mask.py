"""Activation of an MLP and its channel masks, in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bonsai_fast.ops._checks import check_activation, check_floats, check_rows
from bonsai_fast.ops._groups import activate
from bonsai_fast.ops._register import register

# Elements of an intermediate that one thread holds at a time: they stay in a core's cache.
BLOCK_ELEMENTS = 1 << 18


@register()
def glu_mask(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Iterator[Tensor]:
    """Activation of an MLP and each row's channel mask, in one pass.

        out[t, i] = keep[row_group[t], i] ? act(gate[t, i]) * up[t, i] : 0

    A masked channel is selected away, not multiplied: NaN or Inf there gives 0.

    Args:
        gate_up: [T, 2I] float16, bfloat16 or float32, gate then up, contiguous along the last dim.
            Where `gated` is False: [T, I], and out is act(gate_up) under the mask.
        keep: bool [K, I], True = kept.
        row_group: int32 [T] in 0..K-1 (`RowPlan.row_group`).
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: whether the MLP has a gate.

    Returns:
        [T, I] in the dtype of `gate_up`, computed in float32.

    Raises:
        ValueError: an argument does not fit this description.
    """
    check_activation(activation)
    check_floats("gate_up", gate_up, "T", "2I" if gated else "I")
    num_rows, num_channels = gate_up.shape[0], gate_up.shape[1] // (2 if gated else 1)
    if gated and gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2I], gate then up, got {list(gate_up.shape)}")
    check_rows("keep", keep, torch.bool, gate_up, None, num_channels)
    check_rows("row_group", row_group, torch.int32, gate_up, num_rows)
    out = gate_up.new_empty(num_rows, num_channels)
    yield out
    num_block_rows = torch.get_num_threads() * max(1, BLOCK_ELEMENTS // max(1, num_channels))
    for begin in range(0, num_rows, num_block_rows):
        rows = slice(begin, begin + num_block_rows)
        value = activate(gate_up[rows, :num_channels].float(), activation)
        if gated:
            value *= gate_up[rows, num_channels:]
        out[rows] = value.masked_fill_(~keep[row_group[rows].long()], 0.0)
