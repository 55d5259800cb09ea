"""Which sub-models share their hidden states: a tree over their masks, one level per sub-layer.

Sub-models that keep the same parts in all sub-layers up to some depth have the same hidden states
there. When they are sorted by their masks, sub-layer by sub-layer, those that share a prefix are
neighbours, so the depth at which each differs from the one before it describes the whole tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bonsai_fast.models import Block
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.output_weights import SubmodelOutputs


class Branch(NamedTuple):
    """Where hidden states are stored, and the number of the mask that a sub-layer applies."""

    slot: int
    mask: int


@dataclass(frozen=True, eq=False)
class Node:
    """Sub-models that share their hidden states before a sub-layer.

    Attributes:
        slot: where the states are stored: the place of the first of these sub-models.
        children: one branch for each different mask of the sub-layer; the first has `slot`.
    """

    slot: int
    children: tuple[Branch, ...]


class MaskTree:
    """Different sub-models, sorted so that shared prefixes are neighbours.

    Args:
        layout: the units.
        blocks: the sub-layers, in the order in which they run; None for one without units.
        keep: bool [S, P] on the CPU.
        outputs: the sub-models' own output projections. Those that differ by these only have
            different masks, which keep the same.
    Attributes:
        leaf_of_submodel: int64 [S], the leaf of each sub-model; equal sub-models share one.
        num_leaves: number of different sub-models.
    """

    def __init__(
        self,
        layout: Layout,
        blocks: list[Block | None],
        keep: Tensor,
        outputs: SubmodelOutputs | None = None,
    ) -> None:
        self._layout, self._blocks, self._keep = layout, blocks, keep
        self._parts: Mapping[int, Tensor] = {}
        masks = np.zeros((len(blocks), len(keep)), dtype=np.int64)
        # for each mask of a sub-layer, a sub-model that has it
        self._owner: list[NDArray[np.int64]] = []
        for level, block in enumerate(blocks):
            if block is None:
                self._owner.append(np.zeros(1, dtype=np.int64))
                continue
            labels = None if outputs is None else outputs.labels(block)
            owner, masks[level] = _distinct(layout.keep_of_block(block, keep), labels)
            self._owner.append(owner)
        order = np.lexsort(masks[::-1])
        ordered = masks[:, order]
        differs = ordered[:, 1:] != ordered[:, :-1]
        # the depth at which a sub-model differs from the one before it; len(blocks): they are equal
        depth = np.where(differs.any(axis=0), differs.argmax(axis=0), len(blocks))
        is_new = np.concatenate([[True], depth < len(blocks)])
        self._masks = ordered[:, is_new]
        self._departs = np.concatenate([[0], depth])[is_new]
        leaf = np.empty(len(keep), dtype=np.int64)
        leaf[order] = np.cumsum(is_new) - 1
        self.leaf_of_submodel = torch.from_numpy(leaf)
        self.num_leaves = int(is_new.sum())

    def of_parts(self, parts: Mapping[int, Tensor]) -> MaskTree:
        """The same tree, in which `kept` reports only some parts of some sub-layers.

        Args:
            parts: by depth, int64 [n], the parts in the order in which they are reported.
        """
        found = copy(self)
        found._parts = parts
        return found

    def parts(self, depth: int) -> Tensor | None:
        """Which parts of a sub-layer `kept` reports, in this order: int64 [n]; None: all."""
        return self._parts.get(depth)

    def block(self, depth: int) -> Block:
        """The units of a sub-layer that has some."""
        block = self._blocks[depth]
        assert block is not None
        return block

    def submodel_of(self, depth: int, mask: int) -> int:
        """A sub-model that has this mask of a sub-layer, by its row."""
        return int(self._owner[depth][mask])

    def kept(self, depth: int, masks: Sequence[int]) -> Tensor:
        """What masks of a sub-layer keep, by number: bool [masks, query heads or channels]."""
        found = self.kept_of_all_parts(depth, masks)
        return found[:, self._parts[depth]] if depth in self._parts else found

    def kept_by_all(self, depth: int) -> Tensor:
        """What is kept by every sub-model that keeps anything of a sub-layer.

        Returns:
            bool [query heads] or [channels]; all True if none keeps anything.
        """
        kept = self.kept_of_all_parts(depth, range(len(self._owner[depth])))
        return kept[kept.any(dim=1)].all(dim=0)

    def nodes(self, depth: int, leaves: range) -> Iterator[Node]:
        """Nodes before sub-layer `depth` for consecutive leaves; slot 0 is the first of these."""
        start, stop = leaves.start, leaves.stop
        departs, masks = self._departs[start:stop], self._masks[depth, start:stop]
        begins = np.flatnonzero(departs < depth)
        if len(begins) == 0 or begins[0] != 0:
            begins = np.concatenate([[0], begins])
        for begin, end in zip(begins, [*begins[1:], stop - start], strict=True):
            slots = [begin, *(begin + 1 + np.flatnonzero(departs[begin + 1 : end] <= depth))]
            children = tuple(Branch(int(slot), int(masks[slot])) for slot in slots)
            yield Node(int(begin), children)

    def kept_of_all_parts(self, depth: int, masks: Sequence[int]) -> Tensor:
        """The same of all parts, whatever `of_parts` selected."""
        owners = torch.from_numpy(self._owner[depth][list(masks)])
        return self._layout.keep_of_block(self.block(depth), self._keep, owners)


def _distinct(keep: Tensor, labels: Tensor | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first row of each kind, in the rows' sorted order, and the kind of every row.

    The same as `np.unique` over rows, but much faster.

    Args:
        keep: bool [S, parts].
        labels: int64 [S]; rows with different labels are of different kinds. None: all are equal.
    """
    rows = [row.tobytes() for row in np.packbits(keep.numpy(), axis=1)]
    if labels is not None:
        pairs = zip(rows, labels.tolist(), strict=True)
        rows = [row + label.to_bytes(8, "big") for row, label in pairs]
    first: dict[bytes, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row, number)
    kinds = sorted(first)
    kind_of = {row: kind for kind, row in enumerate(kinds)}
    return np.array([first[row] for row in kinds]), np.array([kind_of[row] for row in rows])
