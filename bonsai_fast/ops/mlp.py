"""The MLP of many sub-models: activation under masks, projections of kept channels alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.kernels._checks import check_glu_mask

# Elements of an intermediate that one thread holds at a time: it stays in a core's cache.
BLOCK_ELEMENTS = 1 << 18


def activate(x: Tensor, activation: str) -> Tensor:
    """One of the four activations that the kernels know."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


@torch.library.custom_op("bonsai_fast::glu_mask", mutates_args=())
def glu_mask(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Tensor:
    """Activation of an MLP and every row's channel mask, in one pass.

        out[t, i] = keep[row_group[t], i] ? act(gate[t, i]) * up[t, i] : 0

    A masked channel is selected away, not multiplied: NaN or Inf there gives 0.

    Args:
        gate_up: [T, 2I] float16, bfloat16 or float32, gate then up; [T, I] where `gated` is False,
            and then out is act of it. Contiguous along the last dim.
        keep: bool [K, I], True = kept.
        row_group: int32 [T] in 0..K-1 (`RowPlan.row_group`).
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: whether the MLP has a gate.

    Returns:
        [T, I] in the dtype of `gate_up`, computed in float32.

    Raises:
        ValueError: an argument is none of these.
    """
    check_glu_mask(gate_up, keep, row_group, activation, gated)
    num_rows, num_channels = len(gate_up), keep.shape[1]
    out = gate_up.new_empty(num_rows, num_channels)
    num_block_rows = torch.get_num_threads() * max(1, BLOCK_ELEMENTS // max(1, num_channels))
    for begin in range(0, num_rows, num_block_rows):
        rows = slice(begin, begin + num_block_rows)
        value = activate(gate_up[rows, :num_channels].float(), activation)
        if gated:
            value *= gate_up[rows, num_channels:]
        out[rows] = value.masked_fill_(~keep[row_group[rows].long()], 0.0)
    return out


@glu_mask.register_kernel("cuda")
def _glu_mask_cuda(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Tensor:
    from bonsai_fast.kernels.glu_mask import glu_mask_triton

    return glu_mask_triton(gate_up, keep, row_group, activation=activation, gated=gated)


@glu_mask.register_fake
def _glu_mask_fake(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, *, activation: str, gated: bool
) -> Tensor:
    check_glu_mask(gate_up, keep, row_group, activation, gated)
    return gate_up.new_empty(gate_up.shape[0], keep.shape[1])
