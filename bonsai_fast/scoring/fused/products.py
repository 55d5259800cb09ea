"""Matrix products of a sub-layer: in the model's dtype, or in 8 bits with scales.

Rows of the left side and columns of the right side each have a scale of their own, so that one
token's outlier costs the others nothing:

    a ~ s_a q_a,  b ~ q_b s_b,  a b ~ s_a (q_a q_b) s_b
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["full", "int8", "fp8"]
# a [M, K], b [K, N], out [M, N]: out = a b
Multiply = Callable[[Tensor, Tensor, Tensor], None]

INT8_MAX = 127.0
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# what tensor cores take on CUDA: sizes are multiples of these, and more rows than the last
CUDA_MULTIPLE = {"int8": 8, "fp8": 16}
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


def full(a: Tensor, b: Tensor, out: Tensor) -> None:
    """In the dtype of the operands."""
    torch.mm(a, b, out=out)


def int8(a: Tensor, b: Tensor, out: Tensor) -> None:
    """By 8-bit integers and 32-bit sums; shapes that the device does not take in full precision."""
    if not _fits(a, b, "int8"):
        return full(a, b, out)
    left, left_scale = quantized(a, 1, torch.int8)
    right, right_scale = quantized(b.t(), 1, torch.int8)
    sums = torch._int_mm(left, right.t()).float()
    out.copy_(sums.mul_(left_scale).mul_(right_scale.t()))
    return None


def fp8(a: Tensor, b: Tensor, out: Tensor) -> None:
    """By e4m3 floats; shapes that the device does not take in full precision."""
    if not _fits(a, b, "fp8"):
        return full(a, b, out)
    left, left_scale = quantized(a, 1, FP8)
    right, right_scale = quantized(b.t(), 1, FP8)
    # rows scaled one by one come out in bfloat16 alone
    found = torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scale,
        scale_b=right_scale.t(),
        out_dtype=torch.bfloat16,
    )
    out.copy_(found)
    return None


def quantized(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An 8-bit copy, contiguous, and the float32 scales that it must be multiplied by.

    Args:
        x: [R, C]; what is not finite gives scales that are not.
        dim: along which a scale reaches.
        dtype: int8 or float8_e4m3fn.
    """
    most = INT8_MAX if dtype == torch.int8 else FP8_MAX
    wide = x.float().contiguous()
    scale = wide.abs().amax(dim=dim, keepdim=True).div_(most)
    scale.masked_fill_(scale == 0, 1.0)
    wide = wide / scale
    if dtype == torch.int8:
        wide = wide.round_()
    # NaN has no place in an integer; the scale carries it
    return wide.nan_to_num_(0.0).clamp_(-most, most).to(dtype), scale


def _fits(a: Tensor, b: Tensor, precision: Literal["int8", "fp8"]) -> bool:
    if a.device.type != "cuda":
        return True
    multiple = CUDA_MULTIPLE[precision]
    return len(a) >= MIN_CUDA_ROWS and a.shape[1] % multiple == 0 and b.shape[1] % multiple == 0
