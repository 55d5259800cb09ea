"""Copies of what is kept of projections, in a workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection


def output_columns(spec: Attention | MLP, workspace: Workspace) -> Tensor:
    """The output projection's columns as rows, [columns, D], contiguous: taking some is a plain
    copy. The weight itself if it lies so, or else a copy under the name "output columns"."""
    columns = spec.output.weight.t()
    if columns.is_contiguous():
        return columns
    return workspace("output columns", *columns.shape).copy_(columns)


def take_blocks(
    name: str, matrix: Tensor, index: Tensor, width: int, workspace: Workspace
) -> Tensor:
    """Blocks of neighbouring rows.

    Args:
        name: of the copy in the workspace.
        matrix: [blocks * width, C].
        index: int64 [n], which blocks.
        width: rows of a block.
        workspace: holds the copy.
    Returns:
        [n * width, C], contiguous.
    """
    blocks = matrix.contiguous().view(-1, width * matrix.shape[1])
    copy = workspace(name, len(index), blocks.shape[1])
    torch.index_select(blocks, 0, index.to(matrix.device), out=copy)
    return copy.view(-1, matrix.shape[1])


def take_projection(
    name: str, projection: Projection, index: Tensor, width: int, workspace: Workspace
) -> Projection:
    """The same of weight and bias; arguments as in `take_blocks`."""
    bias = projection.bias
    if bias is not None:
        bias = bias.view(-1, width)[index.to(bias.device)].flatten()
    return Projection(take_blocks(name, projection.weight, index, width, workspace), bias)
