"""Matrices in 8 bits with scales.

Each row of the left side and each column of the right side has its own scale, so one token's
outlier does not cost the other tokens precision:

    a ~ s_a q_a,  b ~ q_b s_b,  a b ~ s_a (q_a q_b) s_b
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace

INT8_MAX = 127.0
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Rows that are quantised and multiplied at once; on a CPU, for each thread. There a block's
# intermediate results stay in the cache; a GPU needs larger blocks to be busy.
BLOCK_ROWS = {"cpu": 256, "cuda": 2048}
# buffers for each entry of a block, bytes: its float32 value, its magnitude, 8 bits, a 32-bit sum
BLOCK_BYTES = 4 + 4 + 1 + 4

# 8-bit rows [R, C], contiguous, and the float32 scales [R, 1] that they must be multiplied by
Scaled = tuple[Tensor, Tensor]


class Weight:
    """The right side of products, with its 8-bit copy, which is made at its first use.

    Do not modify `matrix` during this object's lifetime: the copy is not made again.

    Args:
        matrix: [K, N].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._copies: dict[torch.dtype, Scaled] = {}

    def scaled(self, dtype: torch.dtype, workspace: Workspace) -> Scaled:
        """Its columns as 8-bit rows, [N, K] with scales [N, 1]; the workspace holds temporaries."""
        if dtype not in self._copies:
            rows = self.matrix.t()
            copy = torch.empty(rows.shape, dtype=dtype, device=rows.device)
            self._copies[dtype] = quantize(rows, copy, workspace)
        return self._copies[dtype]


def quantize(x: Tensor, copy: Tensor, workspace: Workspace) -> Scaled:
    """Convert rows to 8 bits.

    Args:
        x: [R, C]; a row with NaN or Inf gets a scale that is not finite.
        copy: int8 or float8_e4m3fn [R, C], contiguous, overwritten.
        workspace: for temporaries.
    Returns:
        `copy`, and new scales.
    """
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    most = INT8_MAX if copy.dtype == torch.int8 else FP8_MAX
    for rows in blocks(len(x), x.device):
        wide = workspace("block", *x[rows].shape, dtype=torch.float32).copy_(x[rows])
        magnitude = workspace("block magnitudes", *wide.shape, dtype=torch.float32)
        scale = torch.abs(wide, out=magnitude).amax(dim=1, keepdim=True).div_(most)
        scale.masked_fill_(scale == 0, 1.0)
        wide.div_(scale)
        if copy.dtype == torch.int8:
            wide.round_()
        # an integer cannot be NaN; the scale is instead
        copy[rows] = wide.nan_to_num_(0.0).clamp_(-most, most)
        scales[rows] = scale
    return copy, scales


def int8_product(left: Scaled, right: Scaled, out: Tensor, workspace: Workspace) -> None:
    """Multiply one block of int8 rows [R, K] by rows [N, K] into [R, N], with 32-bit sums."""
    shape = (len(left[0]), len(right[0]))
    sums = workspace("block sums", *shape, dtype=torch.int32)
    torch._int_mm(left[0], right[0].t(), out=sums)
    wide = workspace("block", *shape, dtype=torch.float32).copy_(sums)
    out.copy_(wide.mul_(left[1]).mul_(right[1].t()))


def fp8_product(left: Scaled, right: Scaled, out: Tensor, workspace: Workspace) -> None:
    """Multiply one block of e4m3 rows [R, K] by rows [N, K] into [R, N]."""
    # with a scale for each row, PyTorch has this product in bfloat16 only
    found = torch._scaled_mm(
        left[0],
        right[0].t(),
        scale_a=left[1],
        scale_b=right[1].t(),
        out_dtype=torch.bfloat16,
    )
    out.copy_(found)


def blocks(rows: int, device: torch.device) -> list[slice]:
    """Cut rows into ranges of almost equal size that are computed one at a time."""
    count = -(-rows // block_rows(device))
    ends = [rows * number // max(1, count) for number in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def block_rows(device: torch.device) -> int:
    """Largest number of rows in a block."""
    if device.type == "cuda":
        return BLOCK_ROWS["cuda"]
    return BLOCK_ROWS["cpu"] * torch.get_num_threads()
