"""MLPs before their output projection, by matrix products."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.row_masks import RowMasks
from bonsai_fast.scoring.fused.operands.operands import MLPOperands


def activated(operands: MLPOperands, normed: Tensor, arithmetic: Arithmetic) -> Tensor:
    """activation(gate(x)) * up(x), or activation(up(x)), by PyTorch's functions.

    Args:
        operands: weights.
        normed: [R, T, D], contiguous.
        arithmetic: computes the products.
    Returns:
        [R, T, channels], in buffer "first".
    """
    rows, length, _ = normed.shape
    shape = (rows, length, operands.columns)
    outs = [arithmetic.buffer(name, *shape) for name in ("first", "second")[: len(operands.inputs)]]
    flat = [out.flatten(0, 1) for out in outs]
    arithmetic.project(normed, operands.inputs, operands.weights, flat)
    found = outs[0]
    if isinstance(operands.spec.activation, nn.SiLU):
        F.silu(found, inplace=True)
    else:
        found.copy_(operands.spec.activation(found))
    return found if len(outs) == 1 else found.mul_(outs[1])


def activated_and_masked(
    operands: MLPOperands,
    normed: Tensor,
    masks: RowMasks | None,
    activation: str,
    arithmetic: Arithmetic,
) -> Tensor:
    """The same with masks, by op `glu_mask`, which applies activation and masks in one pass.

    Args:
        operands, normed, arithmetic: as for `activated`.
        masks: which channels each row keeps; None: all.
        activation: its name in the ops.
    Returns:
        A new tensor [R, T, channels].
    """
    rows, length, _ = normed.shape
    channels, count = operands.columns, len(operands.inputs)
    gate_up = arithmetic.buffer("gate and up", rows * length, count * channels)
    parts = gate_up.split(channels, dim=1)
    arithmetic.project(normed, operands.inputs, operands.weights, parts)
    if masks is None:
        keep = torch.ones(1, channels, dtype=torch.bool, device=normed.device)
        mask_of_token = torch.zeros(rows * length, dtype=torch.int32, device=normed.device)
    else:
        keep, mask_of_token = masks.keep, masks.mask_of_token(length)
    found: Tensor = ops.glu_mask(
        gate_up, keep, mask_of_token, activation=activation, gated=count > 1
    )
    return found.view(rows, length, channels)
