"""How the matrix products of a sub-layer are taken: in the model's dtype, or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

# b [K, N] and where to put a b, [M, N]
Pair = tuple[Weight, Tensor]
# a [M, K] by every b; what lies between is put into the workspace
Multiply = Callable[[Tensor, Sequence[Pair], Workspace], None]

# what tensor cores take on CUDA: sizes are multiples of these, and more rows than the last
CUDA_MULTIPLE = {torch.int8: 8, FP8: 16}
MIN_CUDA_ROWS = 17
# first compute capability that has the products
CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}


def products(precision: Precision, device: torch.device) -> Multiply:
    """How products are taken.

    Raises:
        ValueError: the device has no such products.
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


def full(a: Tensor, pairs: Sequence[Pair], workspace: Workspace) -> None:
    """In the dtype of the operands."""
    for weight, out in pairs:
        torch.mm(a, weight.matrix, out=out)


def int8(a: Tensor, pairs: Sequence[Pair], workspace: Workspace) -> None:
    """By 8-bit integers and 32-bit sums; shapes that the device does not take in full precision."""
    _in_8_bits(a, pairs, workspace, torch.int8, int8_product)


def fp8(a: Tensor, pairs: Sequence[Pair], workspace: Workspace) -> None:
    """By e4m3 floats; shapes that the device does not take in full precision."""
    _in_8_bits(a, pairs, workspace, FP8, fp8_product)


def _in_8_bits(
    a: Tensor,
    pairs: Sequence[Pair],
    workspace: Workspace,
    dtype: torch.dtype,
    product: Callable[[Scaled, Scaled, Tensor, Workspace], None],
) -> None:
    full(a, [pair for pair in pairs if not _fits(a, pair[0].matrix, dtype)], workspace)
    fitting = [pair for pair in pairs if _fits(a, pair[0].matrix, dtype)]
    rights = [weight.scaled(dtype, workspace) for weight, _ in fitting]
    for rows in blocks(len(a), a.device) if fitting else ():
        block = a[rows]
        left = quantize(block, workspace("block in 8 bits", *block.shape, dtype=dtype), workspace)
        for right, (_, out) in zip(rights, fitting, strict=True):
            product(left, right, out[rows], workspace)


def _fits(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    if a.device.type != "cuda":
        return True
    multiple = CUDA_MULTIPLE[dtype]
    return len(a) >= MIN_CUDA_ROWS and a.shape[1] % multiple == 0 and b.shape[1] % multiple == 0
