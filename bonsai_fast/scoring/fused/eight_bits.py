"""Matrices in 8 bits with scales.

Rows of the left side and columns of the right side each have a scale of their own, so that one
token's outlier costs the others nothing:

    a ~ s_a q_a,  b ~ q_b s_b,  a b ~ s_a (q_a q_b) s_b
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127.0
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# rows that are made and multiplied at a time, on a CPU for each thread: there what lies between
# stays in its cache, a GPU is busy with so many
BLOCK_ROWS = {"cpu": 256, "cuda": 2048}
# what is held for each entry of a block at once: it in float32, its magnitude, and its 8 bits; or
# a 32-bit sum and its float32
BLOCK_BYTES = 4 + 4 + 1


class Weight:
    """The right side of products, and its 8-bit copy, made when it is first asked for.

    Belongs to those who know that the matrix stays as it is, and ends with them: memory that gets
    other contents is another weight.

    Args:
        matrix: [K, N].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._copies: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def quantized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Its columns as rows, [N, K] contiguous, and their scales, float32 [N, 1]."""
        if dtype not in self._copies:
            self._copies[dtype] = quantized(self.matrix.t(), dtype)
        return self._copies[dtype]


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An 8-bit copy, contiguous, and the float32 scales [R, 1] that it must be multiplied by.

    Args:
        x: [R, C]; a row that is not finite gets a scale that is not.
        dtype: int8 or float8_e4m3fn.
    """
    copy = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    most = INT8_MAX if dtype == torch.int8 else FP8_MAX
    for rows in blocks(len(x), x.device):
        wide = x[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        scale = wide.abs().amax(dim=1, keepdim=True).div_(most)
        scale.masked_fill_(scale == 0, 1.0)
        wide.div_(scale)
        if dtype == torch.int8:
            wide.round_()
        # NaN has no place in an integer; the scale carries it
        copy[rows] = wide.nan_to_num_(0.0).clamp_(-most, most)
        scales[rows] = scale
    return copy, scales


def blocks(rows: int, device: torch.device) -> list[slice]:
    """Ranges of rows, as equal as can be, that are made at a time."""
    count = -(-rows // block_rows(device))
    ends = [rows * number // max(1, count) for number in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


def block_rows(device: torch.device) -> int:
    """Rows of a block at most."""
    if device.type == "cuda":
        return BLOCK_ROWS["cuda"]
    return BLOCK_ROWS["cpu"] * torch.get_num_threads()
