"""What a sub-layer computes: from the residual stream to its output projection."""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.scoring.fused.activated_channels import activated, activated_and_masked
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.products import Product
from bonsai_fast.scoring.fused.arithmetic.row_masks import RowMasks
from bonsai_fast.scoring.fused.operands.gather import GatherOperands
from bonsai_fast.scoring.fused.operands.operands import AttentionOperands, Operands
from bonsai_fast.scoring.fused.parent import SubLayer
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.fused.rotary_attention import attend


def inner(
    operands: Operands,
    states: Tensor,
    positions: Positions,
    arithmetic: Arithmetic,
    masks: RowMasks | None = None,
) -> Tensor:
    """Everything before the output projection.

    Args:
        operands: weights.
        states: [R, T, D], the residual stream.
        positions: of T tokens.
        arithmetic: computes; gathered products are always in full precision. The result may be in
            its buffer "first"; "second" is free again.
        masks: which of the operands' parts each row keeps; None: all of them.
    Returns:
        [R, T, columns of the output projection], contiguous, 0 where a row keeps nothing.
    """
    normed = arithmetic.normalize(operands.spec.norm, states)
    return inner_of_normed(operands, normed, positions, arithmetic, masks)


def inner_of_normed(
    operands: Operands,
    normed: Tensor,
    positions: Positions,
    arithmetic: Arithmetic,
    masks: RowMasks | None = None,
) -> Tensor:
    """`inner` from the norm's output on."""
    if isinstance(operands, GatherOperands):
        inputs = operands.inner(normed, positions)
    elif isinstance(operands, AttentionOperands):
        inputs = attend(operands, normed, positions, arithmetic)
    elif arithmetic.kernels and operands.spec.activation_name is not None:
        activation = operands.spec.activation_name
        return activated_and_masked(operands, normed, masks, activation, arithmetic)
    else:
        inputs = activated(operands, normed, arithmetic)
    return inputs if masks is None else masks.zero_removed(inputs)


def finish(sublayer: SubLayer, change: Tensor, arithmetic: Arithmetic) -> Tensor:
    """What is added to the residual stream.

    Args:
        sublayer: the sub-layer.
        change: [..., D], from its output projection; may be overwritten.
        arithmetic: computes the norm.
    Returns:
        [..., D]: `change`, or the buffer "post-normed", or a new tensor.
    """
    change = arithmetic.normalize(sublayer.post_norm, change, "post-normed")
    factor = sublayer.residual_factor
    return change if factor == 1.0 else change.mul_(factor)


def project_out(operands: Operands, inputs: Tensor, out: Tensor, arithmetic: Arithmetic) -> Tensor:
    """The output projection.

    Args:
        operands: weights.
        inputs: [R, T, columns], contiguous.
        out: [R, T, D], contiguous, may be overwritten.
        arithmetic: computes the product.
    Returns:
        [R, T, D], contiguous: `out`, or a new tensor.
    """
    if isinstance(operands, GatherOperands):
        return operands.project_out(inputs)
    flat = out.view(-1, out.shape[-1])
    arithmetic.multiply(inputs.view(-1, inputs.shape[-1]), [Product(operands.output, flat)])
    bias = operands.spec.output.bias
    if bias is not None:
        flat.add_(bias)
    return out
