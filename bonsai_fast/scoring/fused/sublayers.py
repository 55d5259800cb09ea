"""The arithmetic of a sub-layer, from its input to the input of its output projection and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.scoring.fused.arithmetic.causal_attention import attention
from bonsai_fast.scoring.fused.arithmetic.eight_bits import Weight
from bonsai_fast.scoring.fused.arithmetic.products import Multiply, full
from bonsai_fast.scoring.fused.arithmetic.row_masks import RowMasks
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.operands.gather import GatherOperands
from bonsai_fast.scoring.fused.operands.operands import AttentionOperands, MLPOperands, Operands
from bonsai_fast.scoring.fused.parent import Norm, Projection
from bonsai_fast.scoring.fused.positions import Positions


def normalize(
    norm: Norm,
    states: Tensor,
    workspace: Workspace,
    name: str = "normed",
    *,
    kernels: bool = False,
) -> Tensor:
    """RMS norm of the last dimension, in float32.

    Args:
        norm: its factors.
        states: [..., D].
        workspace: holds the result under this name, and what it takes on the way.
        kernels: whether one kernel of PyTorch's computes it, which a GPU has, into new memory.
    """
    if kernels and not norm.adds_one:
        return F.rms_norm(states, states.shape[-1:], norm.weight, norm.eps)
    out = workspace(name, *states.shape)
    wide = workspace("float32", *states.shape, dtype=torch.float32)
    wide.copy_(states)
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse.div_(states.shape[-1]).add_(norm.eps).rsqrt_()
    weight = 1.0 + norm.weight.float() if norm.adds_one else norm.weight.float()
    return out.copy_(wide.mul_(inverse).mul_(weight))


def inner(
    operands: Operands,
    states: Tensor,
    positions: Positions,
    workspace: Workspace,
    masks: RowMasks | None = None,
    *,
    multiply: Multiply = full,
    kernels: bool = False,
) -> Tensor:
    """What flows into the output projection.

    Args:
        operands: weights.
        states: [R, T, D], the residual stream.
        positions: of T tokens.
        workspace: "second" may be used again afterwards, "first" may not.
        masks: what the rows keep of these operands' parts; None: everything.
        multiply: how products are taken; gathered ones always in full precision.
        kernels: whether activation and masks are one pass of the project's own, and the norm one of
            PyTorch's.
    Returns:
        [R, T, columns of the output projection], contiguous, 0 where a row keeps nothing; may live
        in the workspace.
    """
    normed = normalize(operands.spec.norm, states, workspace, kernels=kernels)
    return inner_of_normed(
        operands, normed, positions, workspace, masks, multiply=multiply, kernels=kernels
    )


def inner_of_normed(
    operands: Operands,
    normed: Tensor,
    positions: Positions,
    workspace: Workspace,
    masks: RowMasks | None = None,
    *,
    multiply: Multiply = full,
    kernels: bool = False,
) -> Tensor:
    """`inner` behind the norm, whose output `normed` is."""
    if isinstance(operands, GatherOperands):
        inputs = operands.inner(normed, positions)
    elif isinstance(operands, AttentionOperands):
        inputs = _attend(operands, normed, positions, workspace, multiply, kernels)
    elif kernels and operands.spec.activation_name is not None:
        name = operands.spec.activation_name
        return _gated_and_masked(operands, normed, masks, name, workspace, multiply)
    else:
        inputs = _gated(operands, normed, workspace, multiply)
    return inputs if masks is None else masks.zero_removed(inputs)


def project_out(
    operands: Operands,
    inputs: Tensor,
    out: Tensor,
    workspace: Workspace,
    multiply: Multiply = full,
) -> Tensor:
    """The output projection.

    Args:
        operands: weights.
        inputs: [R, T, columns], contiguous.
        out: [R, T, D], contiguous, may be overwritten.
        workspace, multiply: as in `inner`.
    Returns:
        [R, T, D], contiguous; `out`, or a new tensor.
    """
    if isinstance(operands, GatherOperands):
        return operands.project_out(inputs)
    flat = out.view(-1, out.shape[-1])
    multiply(inputs.view(-1, inputs.shape[-1]), [(operands.output, flat)], workspace)
    bias = operands.spec.output.bias
    if bias is not None:
        flat.add_(bias)
    return out


def _project(
    projections: Sequence[Projection],
    weights: Sequence[Weight],
    inputs: Tensor,
    outs: Sequence[Tensor],
    workspace: Workspace,
    multiply: Multiply,
) -> None:
    """The same inputs [R, T, D] by several projections, into [R * T, columns] each."""
    multiply(inputs.view(-1, inputs.shape[-1]), list(zip(weights, outs, strict=True)), workspace)
    for projection, out in zip(projections, outs, strict=True):
        if projection.bias is not None:
            out.add_(projection.bias)


def _gated(
    operands: MLPOperands, normed: Tensor, workspace: Workspace, multiply: Multiply
) -> Tensor:
    rows, length, _ = normed.shape
    shape = (rows, length, len(operands.gate.weight))
    gate, up = workspace("first", *shape), workspace("second", *shape)
    halves = (gate.flatten(0, 1), up.flatten(0, 1))
    _project((operands.gate, operands.up), operands.weights, normed, halves, workspace, multiply)
    if isinstance(operands.spec.activation, nn.SiLU):
        F.silu(gate, inplace=True)
    else:
        gate.copy_(operands.spec.activation(gate))
    return gate.mul_(up)


def _gated_and_masked(
    operands: MLPOperands,
    normed: Tensor,
    masks: RowMasks | None,
    activation: str,
    workspace: Workspace,
    multiply: Multiply,
) -> Tensor:
    rows, length, _ = normed.shape
    channels = len(operands.gate.weight)
    gate_up = workspace("gate and up", rows * length, 2 * channels)
    halves = gate_up.split(channels, dim=1)
    _project((operands.gate, operands.up), operands.weights, normed, halves, workspace, multiply)
    if masks is None:
        keep = torch.ones(1, channels, dtype=torch.bool, device=normed.device)
        mask_of_token = torch.zeros(rows * length, dtype=torch.int32, device=normed.device)
    else:
        keep, mask_of_token = masks.keep, masks.mask_of_token(length)
    gated: Tensor = ops.glu_mask(gate_up, keep, mask_of_token, activation=activation, gated=True)
    return gated.view(rows, length, channels)


def _attend(
    operands: AttentionOperands,
    normed: Tensor,
    positions: Positions,
    workspace: Workspace,
    multiply: Multiply,
    kernels: bool,
) -> Tensor:
    spec = operands.spec
    rows, length, _ = normed.shape
    parts = {"second": operands.query, "key": operands.key, "value": operands.value}
    outs = [workspace(name, rows * length, len(part.weight)) for name, part in parts.items()]
    _project(list(parts.values()), operands.weights, normed, outs, workspace, multiply)
    query, key, value = (out.view(rows, length, -1, spec.block.head_dim) for out in outs)
    if spec.query_norm is not None:
        query = normalize(spec.query_norm, query, workspace, "normed query", kernels=kernels)
    if spec.key_norm is not None:
        key = normalize(spec.key_norm, key, workspace, "normed key", kernels=kernels)
    query = _rotate("first", query, positions, workspace)
    key = _rotate("rotated key", key, positions, workspace)
    value = value.transpose(1, 2)
    if operands.q_heads_per_kv is None:
        heads = torch.tensor(operands.kv_of_head, device=key.device)
        key, value = key.index_select(1, heads), value.index_select(1, heads)
    return attention(query, key, value, scale=spec.scale, mask=positions.mask(spec.window))


def _rotate(name: str, heads: Tensor, positions: Positions, workspace: Workspace) -> Tensor:
    """Rotary positions: [R, T, H, K] -> [R, H, T, K]."""
    rows, length, num_heads, head_dim = heads.shape
    out = workspace(name, rows, num_heads, length, head_dim)
    heads = heads.transpose(1, 2)
    cos, sin = positions.cos, positions.sin
    half = cos.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :].copy_(heads[..., 2 * half :])
    return out
