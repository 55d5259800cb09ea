"""Copies of some heads or channels of projections, in buffers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection


class Heads(NamedTuple):
    """Some query heads of an attention sub-layer.

    Attributes:
        query, key, value: their rows, and those of the KV heads that they read.
        output_rows: [heads * head_dim, D], their columns of the output projection, as rows.
        kv_of_head: the KV head that each head reads, numbered among these KV heads.
    """

    query: Projection
    key: Projection
    value: Projection
    output_rows: Tensor
    kv_of_head: tuple[int, ...]


def output_columns(spec: Attention | MLP, arithmetic: Arithmetic) -> Tensor:
    """The output projection's columns as contiguous rows, [columns, D].

    They are the weight itself if it is stored like that, else a copy in buffer "output columns".
    """
    columns = spec.output.weight.t()
    if columns.is_contiguous():
        return columns
    return arithmetic.buffer("output columns", *columns.shape).copy_(columns)


def take_heads(
    prefix: str, spec: Attention, heads: Tensor, columns: Tensor, arithmetic: Arithmetic
) -> Heads:
    """Copy some query heads and the KV heads that they read.

    Args:
        prefix: of the names of the buffers.
        spec: the sub-layer.
        heads: int64 [n], which query heads.
        columns: of `output_columns`.
        arithmetic: has the buffers.
    """
    width = spec.head_dim
    kv_heads, kv_of_head = torch.tensor(spec.kv_of_head)[heads].unique(return_inverse=True)
    query = take_projection(f"{prefix} query", spec.query, heads, width, arithmetic)
    key = take_projection(f"{prefix} key", spec.key, kv_heads, width, arithmetic)
    value = take_projection(f"{prefix} value", spec.value, kv_heads, width, arithmetic)
    rows = take_blocks(f"{prefix} output", columns, heads, width, arithmetic)
    return Heads(query, key, value, rows, tuple(kv_of_head.tolist()))


def take_projection(
    name: str, projection: Projection, index: Tensor, width: int, arithmetic: Arithmetic
) -> Projection:
    """Copy blocks of rows of weight and bias; arguments as for `take_blocks`."""
    bias = projection.bias
    if bias is not None:
        bias = bias.view(-1, width)[index.to(bias.device)].flatten()
    return Projection(take_blocks(name, projection.weight, index, width, arithmetic), bias)


def take_blocks(
    name: str, matrix: Tensor, index: Tensor, width: int, arithmetic: Arithmetic
) -> Tensor:
    """Copy blocks of consecutive rows.

    Args:
        name: of the buffer.
        matrix: [blocks * width, C].
        index: int64 [n], which blocks.
        width: rows of a block.
        arithmetic: has the buffer.
    Returns:
        [n * width, C], contiguous.
    """
    blocks = matrix.contiguous().view(-1, width * matrix.shape[1])
    copy = arithmetic.buffer(name, len(index), blocks.shape[1])
    torch.index_select(blocks, 0, index.to(matrix.device), out=copy)
    return copy.view(-1, matrix.shape[1])
