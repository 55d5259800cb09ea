"""How the matrix products of a sub-layer are taken: in the model's dtype, or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.eight_bits import FP8, Weight, blocks, quantized

Precision = Literal["full", "int8", "fp8"]
# b [K, N] and where to put a b, [M, N]
Pair = tuple[Weight, Tensor]
# a [M, K] by every b
Multiply = Callable[[Tensor, Sequence[Pair]], None]

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


def full(a: Tensor, pairs: Sequence[Pair]) -> None:
    """In the dtype of the operands."""
    for weight, out in pairs:
        torch.mm(a, weight.matrix, out=out)


def int8(a: Tensor, pairs: Sequence[Pair]) -> None:
    """By 8-bit integers and 32-bit sums; shapes that the device does not take in full precision."""
    _in_8_bits(a, pairs, torch.int8, _int8_product)


def fp8(a: Tensor, pairs: Sequence[Pair]) -> None:
    """By e4m3 floats; shapes that the device does not take in full precision."""
    _in_8_bits(a, pairs, FP8, _fp8_product)


# rows [R, K] with scales [R, 1], rows [N, K] with scales [N, 1] -> [R, N]
_Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _in_8_bits(a: Tensor, pairs: Sequence[Pair], dtype: torch.dtype, product: _Product) -> None:
    full(a, [(weight, out) for weight, out in pairs if not _fits(a, weight.matrix, dtype)])
    fitting = [(weight, out) for weight, out in pairs if _fits(a, weight.matrix, dtype)]
    for rows in blocks(len(a), a.device) if fitting else ():
        left = quantized(a[rows], dtype)
        for weight, out in fitting:
            out[rows] = product(*left, *weight.quantized(dtype))


def _int8_product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor) -> Tensor:
    sums = torch._int_mm(left, right.t()).float()
    return sums.mul_(left_scale).mul_(right_scale.t())


def _fp8_product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor) -> Tensor:
    # rows scaled one by one come out in bfloat16 alone
    found: Tensor = torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scale,
        scale_b=right_scale.t(),
        out_dtype=torch.bfloat16,
    )
    return found


def _fits(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    if a.device.type != "cuda":
        return True
    multiple = CUDA_MULTIPLE[dtype]
    return len(a) >= MIN_CUDA_ROWS and a.shape[1] % multiple == 0 and b.shape[1] % multiple == 0
