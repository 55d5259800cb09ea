"""How the matrix products of a sub-layer are computed: in the model's dtype, or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bonsai_fast.config.choices import Precision
from bonsai_fast.scoring.fused.arithmetic.eight_bits import (
    FP8,
    Scaled,
    Weight,
    blocks,
    fp8_product,
    int8_product,
    quantize,
)
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace


class Product(NamedTuple):
    """The right side of a product, [K, N], and where to write the result, [M, N]."""

    weight: Weight
    out: Tensor


# multiplies a [M, K] by every weight; intermediate results are put into the workspace
Multiply = Callable[[Tensor, Sequence[Product], Workspace], None]

# CUDA's 8-bit products need sizes that are multiples of these, and at least MIN_CUDA_ROWS rows
CUDA_MULTIPLE = {torch.int8: 8, FP8: 16}
MIN_CUDA_ROWS = 17
# first compute capability that has the products
CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}


def products(precision: Precision, device: torch.device) -> Multiply:
    """The function that multiplies in this precision.

    Raises:
        ValueError: the device does not support it.
    """
    if precision == "full":
        return full
    if device.type == "cuda":
        found, needed = torch.cuda.get_device_capability(device), CAPABILITY[precision]
        if found < needed:
            raise ValueError(
                f"precision {precision}: needs a GPU of compute capability "
                f"{needed[0]}.{needed[1]} or newer, this one has {found[0]}.{found[1]}"
            )
    elif precision == "fp8":
        raise ValueError(
            f"precision fp8: needs a GPU of compute capability 8.9 or newer, "
            f"the model is on {device.type}"
        )
    return int8 if precision == "int8" else fp8


def full(a: Tensor, pairs: Sequence[Product], workspace: Workspace) -> None:
    """Multiply in the dtype of the operands."""
    for weight, out in pairs:
        torch.mm(a, weight.matrix, out=out)


def int8(a: Tensor, pairs: Sequence[Product], workspace: Workspace) -> None:
    """Multiply 8-bit integers with 32-bit sums; in full precision where the device cannot."""
    _in_8_bits(a, pairs, workspace, torch.int8, int8_product)


def fp8(a: Tensor, pairs: Sequence[Product], workspace: Workspace) -> None:
    """Multiply e4m3 floats; in full precision where the device cannot."""
    _in_8_bits(a, pairs, workspace, FP8, fp8_product)


def _in_8_bits(
    a: Tensor,
    pairs: Sequence[Product],
    workspace: Workspace,
    dtype: torch.dtype,
    multiply: Callable[[Scaled, Scaled, Tensor, Workspace], None],
) -> None:
    full(a, [pair for pair in pairs if not _fits(a, pair[0].matrix, dtype)], workspace)
    fitting = [pair for pair in pairs if _fits(a, pair[0].matrix, dtype)]
    rights = [weight.scaled(dtype, workspace) for weight, _ in fitting]
    for rows in blocks(len(a), a.device) if fitting else ():
        block = a[rows]
        left = quantize(block, workspace("block in 8 bits", *block.shape, dtype=dtype), workspace)
        for right, (_, out) in zip(rights, fitting, strict=True):
            multiply(left, right, out[rows], workspace)


def _fits(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device has an 8-bit product for these shapes."""
    if a.device.type != "cuda":
        return True
    multiple = CUDA_MULTIPLE[dtype]
    return len(a) >= MIN_CUDA_ROWS and a.shape[1] % multiple == 0 and b.shape[1] % multiple == 0
