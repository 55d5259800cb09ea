"""Copy kept rows or columns of a weight next to each other into a workspace, zeros after them.

    out[r, :] = source[index[r], :]         compact_rows
    out[:, c] = source[:, index[c]]         compact_columns

source [R, C], index [n] -> out with n or more places. The vendor's library multiplies the copies,
one layer of one sub-model at a time, so the workspace holds one layer. The zeros pad to widths at
which the library is fast.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bonsai_fast.kernels._configs import tunable


# Compiled ahead of time, not yet timed on a GPU: 128-bit loads, no spill.
@triton.autotune(
    configs=tunable(
        triton.Config({"BLOCK_C": 2048}, num_warps=4),
        triton.Config({"BLOCK_C": 1024}, num_warps=4),
        triton.Config({"BLOCK_C": 4096}, num_warps=8),
    ),
    key=["num_columns"],
)
@triton.jit(do_not_specialize=["num_kept"])
def _compact_rows_kernel(
    source_ptr, index_ptr, out_ptr,                      # [R, C], [n] -> [m, C]
    num_columns, num_kept,
    stride_sr, stride_or,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_columns, BLOCK_C)
    row = tl.program_id(0) // num_tiles
    offs = tl.program_id(0) % num_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs < num_columns
    source_row = tl.load(index_ptr + tl.minimum(row, num_kept - 1)).to(tl.int64)
    # Nothing is read for rows past the last kept one.
    kept = offs < tl.where(row < num_kept, num_columns, 0)
    value = tl.load(source_ptr + source_row * stride_sr + offs, mask=kept, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * stride_or + offs, value, mask=inside)


# Compiled ahead of time, not yet timed on a GPU: no spill. Kept columns are mostly neighbours: a
# warp's loads are in few sectors.
@triton.autotune(
    configs=tunable(
        triton.Config({"BLOCK_R": 8, "BLOCK_C": 256}, num_warps=4),
        triton.Config({"BLOCK_R": 4, "BLOCK_C": 512}, num_warps=4),
        triton.Config({"BLOCK_R": 16, "BLOCK_C": 128}, num_warps=4),
    ),
    key=["num_places"],
)
@triton.jit(do_not_specialize=["num_rows", "num_places", "num_kept"])
def _compact_columns_kernel(
    source_ptr, index_ptr, out_ptr,                      # [R, C], [n] -> [R, m]
    num_rows, num_places, num_kept,
    stride_sr, stride_or,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_places, BLOCK_C)
    rows = tl.program_id(0) // num_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = tl.program_id(0) % num_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    kept = offs < num_kept
    columns = tl.load(index_ptr + offs, mask=kept, other=0)
    row_offs = rows.to(tl.int64)[:, None]
    inside = (rows < num_rows)[:, None]
    source_ptrs = source_ptr + row_offs * stride_sr + columns[None, :]
    value = tl.load(source_ptrs, mask=inside & kept[None, :], other=0.0)
    out_ptrs = out_ptr + row_offs * stride_or + offs[None, :]
    tl.store(out_ptrs, value, mask=inside & (offs < num_places)[None, :])


def compact_rows_triton(source: Tensor, index: Tensor, out: Tensor) -> None:
    """Launch the kernel; the arguments are those of `bonsai_fast.ops.compact_rows`."""
    if len(index) == 0 or out.numel() == 0:
        out.zero_()
        return
    num_places, num_columns = out.shape

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (num_places * triton.cdiv(num_columns, meta["BLOCK_C"]),)

    _compact_rows_kernel[grid](
        source, index, out,
        num_columns, len(index),
        source.stride(0), out.stride(0),
    )  # fmt: skip


def compact_columns_triton(source: Tensor, index: Tensor, out: Tensor) -> None:
    """Launch the kernel; the arguments are those of `bonsai_fast.ops.compact_columns`."""
    if out.numel() == 0:
        return
    num_rows, num_places = out.shape

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(num_rows, meta["BLOCK_R"]) * triton.cdiv(num_places, meta["BLOCK_C"]),)

    _compact_columns_kernel[grid](
        source, index, out,
        num_rows, num_places, len(index),
        source.stride(0), out.stride(0),
    )  # fmt: skip
