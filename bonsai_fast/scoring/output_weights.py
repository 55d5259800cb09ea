"""Output projections of sub-models that have their own, such as refitted ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bonsai_fast.models import Block, ExpertsBlock
from bonsai_fast.models.layout import Layout


@dataclass(frozen=True, eq=False)
class OutputProjection:
    """The output projection of a sub-layer (o_proj or down_proj) for the parts that it keeps.

    Any float dtype, on any device; it is converted to the model's.

    Attributes:
        weight: [D, kept columns], a column for each kept column of the parent's weight, in the same
            order: head_dim columns for a query head, one for a channel.
        bias: [D]; None: the parent's own bias, if it has one.
    """

    weight: Tensor
    bias: Tensor | None = None


class OutputWeights(Protocol):
    """Makes output projections of sub-layers from which something was removed.

    It must be a pure function: sub-models with the same masks up to some layer share their hidden
    states there. It is called while the layer's weights are in memory, also those of a streamed
    model, at least once per call of the scorer; what it makes is not kept after the layer.
    """

    def __call__(self, block: Block, keep_parts: Tensor, /) -> OutputProjection | None:
        """Make one.

        Args:
            block: the sub-layer.
            keep_parts: bool [query heads] or [channels] on the CPU, what is kept of it. Not all
                True: a sub-layer without removed parts keeps the parent's projection. Perhaps all
                False: then the weight is [D, 0], and only the bias counts.
        Returns:
            The projection; None: the parent's own.
        """


# the same as tensors: by the name of a weight or bias of output projections, one row per sub-model
OutputTensors = Mapping[str, Tensor]


class SubmodelOutputs(Protocol):
    """Own output projections of the sub-models that an engine is given, by row of its masks."""

    def labels(self, block: Block) -> Tensor | None:
        """Int64 [S]: sub-models with other labels differ here, even if their masks are equal.

        None: the projection follows from the mask.
        """

    def has_own(self, block: Block, keep_parts: Tensor) -> bool:
        """Whether sub-models that keep bool [parts] of a sub-layer may have their own there."""

    def projection(self, block: Block, keep_parts: Tensor, row: int) -> OutputProjection | None:
        """That of the sub-model in this row, which keeps bool [parts]; None: the parent's own."""

    def rows(self, rows: Tensor) -> SubmodelOutputs:
        """Those of some rows, int64 [n], which may repeat."""


@dataclass(frozen=True, eq=False)
class OutputsOfMasks:
    """Own output projections made from masks; see `SubmodelOutputs`."""

    make: OutputWeights

    def labels(self, block: Block) -> None:
        """See `SubmodelOutputs`."""

    def has_own(self, block: Block, keep_parts: Tensor) -> bool:
        """See `SubmodelOutputs`."""
        return not bool(keep_parts.all())

    def projection(self, block: Block, keep_parts: Tensor, row: int) -> OutputProjection | None:
        """See `SubmodelOutputs`."""
        return self.make(block, keep_parts)

    def rows(self, rows: Tensor) -> OutputsOfMasks:
        """See `SubmodelOutputs`."""
        return self


@dataclass(frozen=True, eq=False)
class OutputsOfSubmodels:
    """Own output projections given as tensors; see `SubmodelOutputs`.

    Attributes:
        tensors: [sub-models, D, in_features] weights and [sub-models, D] biases, by name.
        numbers: int64 [S], the sub-model of each row.
    """

    tensors: OutputTensors
    numbers: Tensor

    def labels(self, block: Block) -> Tensor | None:
        """See `SubmodelOutputs`."""
        return self.numbers if f"{block.output}.weight" in self.tensors else None

    def has_own(self, block: Block, keep_parts: Tensor) -> bool:
        """See `SubmodelOutputs`."""
        return f"{block.output}.weight" in self.tensors

    def projection(self, block: Block, keep_parts: Tensor, row: int) -> OutputProjection | None:
        """See `SubmodelOutputs`."""
        number = int(self.numbers[row])
        weight = self.tensors[f"{block.output}.weight"][number]
        bias = self.tensors.get(f"{block.output}.bias")
        columns = keep_parts.repeat_interleave(block.part_width)
        return OutputProjection(
            weight[:, columns.to(weight.device)], None if bias is None else bias[number]
        )

    def rows(self, rows: Tensor) -> OutputsOfSubmodels:
        """See `SubmodelOutputs`."""
        return OutputsOfSubmodels(self.tensors, self.numbers[rows])


def submodel_outputs(
    given: OutputWeights | OutputTensors, layout: Layout, num_submodels: int
) -> SubmodelOutputs:
    """What an engine reads, from what a caller gives.

    Raises:
        ValueError: a tensor has another name or shape than expected.
    """
    if not isinstance(given, Mapping):
        return OutputsOfMasks(given)
    blocks = {
        block.output: block
        for block in layout.decoder.blocks()
        if not isinstance(block, ExpertsBlock)  # many projections, chosen by a router
    }
    for name, tensor in given.items():
        output, _, kind = name.rpartition(".")
        block = blocks.get(output)
        if block is None or kind not in ("weight", "bias"):
            raise ValueError(
                f"output_weights: expected names such as {next(iter(blocks))}.weight, got {name}"
            )
        weight = given.get(f"{output}.weight")
        if weight is None:
            raise ValueError(f"output_weights: expected {output}.weight beside {name}")
        dims = 3 if kind == "weight" else 2
        if tensor.dim() != dims or len(tensor) != num_submodels:
            raise ValueError(
                f"output_weights: {name}: expected one row for each of {num_submodels} sub-models "
                f"and {dims} dimensions, got shape {tuple(tensor.shape)}"
            )
        if kind == "weight" and weight.shape[2] != num_columns(block):
            raise ValueError(
                f"output_weights: {name}: expected {num_columns(block)} input features, "
                f"got shape {tuple(tensor.shape)}"
            )
    return OutputsOfSubmodels(given, torch.arange(num_submodels))


def num_columns(block: Block) -> int:
    """Number of columns of a sub-layer's output projection."""
    return sum(len(cut.owner) for cut in block.cuts if cut.dim == 1)


def checked(projection: OutputProjection, block: Block, columns: int, width: int) -> None:
    """Refuse a projection of the wrong shape.

    Args:
        projection: what was made for a sub-layer.
        block: the sub-layer.
        columns: number of kept columns.
        width: D.
    Raises:
        ValueError: weight or bias has another shape.
    """
    shape = tuple(projection.weight.shape)
    if shape != (width, columns):
        raise ValueError(
            f"output_weights: {block.output}: expected a weight of shape {(width, columns)}, "
            f"a column for each kept column, got {shape}"
        )
    bias = projection.bias
    if bias is not None and tuple(bias.shape) != (width,):
        raise ValueError(
            f"output_weights: {block.output}: expected a bias of shape {(width,)}, "
            f"got {tuple(bias.shape)}"
        )
