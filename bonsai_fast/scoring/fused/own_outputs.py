"""Output projections that belong to masks of a sub-layer, instead of the parent's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bonsai_fast.ops.native import take
from bonsai_fast.scoring.fused.arithmetic.eight_bits import Weight
from bonsai_fast.scoring.fused.arithmetic.products import Product
from bonsai_fast.scoring.fused.parent import MLP, Attention
from bonsai_fast.scoring.fused.wave import Wave
from bonsai_fast.scoring.output_weights import SubmodelOutputs, checked


class OwnOutput(NamedTuple):
    """The output projection of one mask.

    Attributes:
        weight: [kept columns, D], in the order in which the tree reports parts.
        bias: [D] or None.
    """

    weight: Weight
    bias: Tensor | None


class OwnOutputs:
    """Makes the output projections of a sub-layer's masks when they are needed.

    Args:
        wave: has the tree, and at most `held_outputs` projections at a time.
        outputs: where projections come from.
        depth: of the sub-layer.
        sublayer: the sub-layer, perhaps packed.
    """

    def __init__(
        self, wave: Wave, outputs: SubmodelOutputs, depth: int, sublayer: Attention | MLP
    ) -> None:
        self._tree, self._arithmetic, self._outputs = wave.tree, wave.arithmetic, outputs
        self._depth, self._sublayer = depth, sublayer
        self._held = max(1, wave.held_outputs)
        self._made: dict[int, OwnOutput] = {}

    def belongs_to(self, mask: int) -> bool:
        """Whether a mask may have its own projection."""
        return self._outputs.has_own(self._tree.block(self._depth), self._kept_of_all(mask))

    def held_together(self, children: Sequence[int], masks: Sequence[int]) -> list[list[int]]:
        """Cut children of a node, in their order, into groups whose projections are all held.

        Args:
            children: their numbers.
            masks: the mask of each child, by number.
        """
        groups: list[list[int]] = [[]]
        count = 0
        for child in children:
            if self.belongs_to(masks[child]):
                if count == self._held:
                    groups.append([])
                    count = 0
                count += 1
            groups[-1].append(child)
        return groups

    def of(self, mask: int) -> OwnOutput:
        """The projection of a mask that may have its own.

        Raises:
            ValueError: one of a wrong shape was made.
        """
        if mask in self._made:
            self._made[mask] = self._made.pop(mask)  # the last one used is dropped last
        else:
            if len(self._made) == self._held:
                del self._made[next(iter(self._made))]
            self._made[mask] = self._make(mask)
        return self._made[mask]

    def project(self, mask: int, inputs: Tensor, computed: Tensor, out: Tensor) -> None:
        """Apply the projection of a mask, with its bias.

        Args:
            mask: its number.
            inputs: [R, T, columns], contiguous; columns of removed parts are not read.
            computed: int64 [n], the parts that own the first columns, as the tree numbers them.
            out: [R, T, D], contiguous, overwritten.
        """
        own, width = self.of(mask), self._sublayer.block.part_width
        places = self._tree.kept(self._depth, [mask])[0][computed].nonzero().flatten()
        parts, weight = computed[places], own.weight
        if bool((parts[1:] < parts[:-1]).any()):
            weight = Weight(weight.matrix[_ranks(parts, width).to(out.device)])
        flat = out.view(-1, out.shape[-1])
        if len(places) == 0:
            out.zero_()
        else:
            self._arithmetic.multiply(_taken(inputs, places, width), [Product(weight, flat)])
        if own.bias is not None:
            out.add_(own.bias)

    def _make(self, mask: int) -> OwnOutput:
        block, kept = self._tree.block(self._depth), self._kept_of_all(mask)
        row = self._tree.submodel_of(self._depth, mask)
        made = self._outputs.projection(block, kept, row)
        parent, width = self._sublayer.output, self._sublayer.block.part_width
        places = self._tree.kept(self._depth, [mask])[0].nonzero().flatten()
        if made is None:
            columns = _columns(places, width).to(parent.weight.device)
            return OwnOutput(Weight(parent.weight.index_select(1, columns).t()), parent.bias)
        checked(made, block, int(kept.sum()) * width, len(parent.weight))
        rows, parts = made.weight.to(parent.weight).t(), self._tree.parts(self._depth)
        if parts is not None:
            rows = rows[_ranks(parts[places], width).to(rows.device)]
        bias = parent.bias if made.bias is None else made.bias.to(parent.weight)
        return OwnOutput(Weight(rows), bias)

    def _kept_of_all(self, mask: int) -> Tensor:
        return self._tree.kept_of_all_parts(self._depth, [mask])[0]


def _taken(inputs: Tensor, places: Tensor, width: int) -> Tensor:
    """Columns of some places: [R, T, columns] -> [R * T, places * width]; a view if possible."""
    if int(places[-1]) == len(places) - 1:
        return inputs[..., : len(places) * width].flatten(0, 1)
    return take(inputs.flatten(0, 1), _columns(places, width), 1)


def _ranks(parts: Tensor, width: int) -> Tensor:
    """Where the columns of each part are when parts are in ascending order: int64."""
    return _columns(parts.argsort().argsort(), width)


def _columns(places: Tensor, width: int) -> Tensor:
    """Numbers of blocks of columns -> numbers of columns."""
    return (places[:, None] * width + torch.arange(width)).flatten()
