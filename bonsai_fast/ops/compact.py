"""Copy kept rows or columns of a matrix next to each other into a workspace."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bonsai_fast.ops._checks import check_floats, check_rows
from bonsai_fast.ops._register import register


@register(mutates=("out",))
def compact_rows(source: Tensor, index: Tensor, out: Tensor) -> Iterator[None]:
    """Copy kept rows next to each other into a workspace, zeros after them.

        out[r] = source[index[r]] for r < n, 0 from n on

    Args:
        source: [R, C] float16, bfloat16 or float32, contiguous along C.
        index: int32 [n] in 0..R-1.
        out: [m, C] in the dtype of `source`, m >= n; overwritten.

    Raises:
        ValueError: an argument does not fit this description.
    """
    _check(source, index, out, 0)
    yield
    out[: len(index)] = source[index.long()]
    out[len(index) :] = 0


@register(mutates=("out",))
def compact_columns(source: Tensor, index: Tensor, out: Tensor) -> Iterator[None]:
    """Copy kept columns next to each other into a workspace, zeros after them.

        out[:, c] = source[:, index[c]] for c < n, 0 from n on

    Args:
        source: [R, C] float16, bfloat16 or float32, contiguous along C.
        index: int32 [n] in 0..C-1.
        out: [R, m] in the dtype of `source`, m >= n; overwritten.

    Raises:
        ValueError: an argument does not fit this description.
    """
    _check(source, index, out, 1)
    yield
    out[:, : len(index)] = source[:, index.long()]
    out[:, len(index) :] = 0


def _check(source: Tensor, index: Tensor, out: Tensor, dim: int) -> None:
    check_floats("source", source, "R", "C")
    check_rows("index", index, torch.int32, source, None)
    shape = [None if axis == dim else size for axis, size in enumerate(source.shape)]
    check_rows("out", out, source.dtype, source, *shape)
    if out.shape[dim] < index.shape[0]:
        raise ValueError(f"out must have at least {len(index)} places, got {out.shape[dim]}")
