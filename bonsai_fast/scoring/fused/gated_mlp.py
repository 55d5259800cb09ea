"""Gated MLPs before their output projection, by matrix products."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.row_masks import RowMasks
from bonsai_fast.scoring.fused.operands.operands import MLPOperands


def gated(operands: MLPOperands, normed: Tensor, arithmetic: Arithmetic) -> Tensor:
    """activation(gate(x)) * up(x) by PyTorch's functions.

    Args:
        operands: weights.
        normed: [R, T, D], contiguous.
        arithmetic: computes the products.
    Returns:
        [R, T, channels], in buffer "first".
    """
    rows, length, _ = normed.shape
    shape = (rows, length, len(operands.gate.weight))
    gate, up = arithmetic.buffer("first", *shape), arithmetic.buffer("second", *shape)
    halves = (gate.flatten(0, 1), up.flatten(0, 1))
    arithmetic.project(normed, (operands.gate, operands.up), operands.weights, halves)
    if isinstance(operands.spec.activation, nn.SiLU):
        F.silu(gate, inplace=True)
    else:
        gate.copy_(operands.spec.activation(gate))
    return gate.mul_(up)


def gated_and_masked(
    operands: MLPOperands,
    normed: Tensor,
    masks: RowMasks | None,
    activation: str,
    arithmetic: Arithmetic,
) -> Tensor:
    """The same with masks, by op `glu_mask`, which applies activation and masks in one pass.

    Args:
        operands, normed, arithmetic: as for `gated`.
        masks: which channels each row keeps; None: all.
        activation: its name in the ops.
    Returns:
        A new tensor [R, T, channels].
    """
    rows, length, _ = normed.shape
    channels = len(operands.gate.weight)
    gate_up = arithmetic.buffer("gate and up", rows * length, 2 * channels)
    halves = gate_up.split(channels, dim=1)
    arithmetic.project(normed, (operands.gate, operands.up), operands.weights, halves)
    if masks is None:
        keep = torch.ones(1, channels, dtype=torch.bool, device=normed.device)
        mask_of_token = torch.zeros(rows * length, dtype=torch.int32, device=normed.device)
    else:
        keep, mask_of_token = masks.keep, masks.mask_of_token(length)
    found: Tensor = ops.glu_mask(gate_up, keep, mask_of_token, activation=activation, gated=True)
    return found.view(rows, length, channels)
