"""What sub-models share: a tree over their masks, one level a sub-layer.

Sub-models that keep the same in all sub-layers up to some depth have the same hidden states there.
Ordered by their masks, layer by layer, those that share a prefix are neighbours; how far a
sub-model agrees with the one before it tells everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bonsai_fast.models import Block
from bonsai_fast.models.layout import Layout


@dataclass(frozen=True, eq=False)
class Node:
    """Sub-models with the same states, before some sub-layer.

    Attributes:
        slot: number of the first of them, where the states are held.
        children: (mask, slot) for every different mask of the sub-layer; the first has `slot`.
    """

    slot: int
    children: tuple[tuple[int, int], ...]


class MaskTree:
    """Distinct sub-models, ordered so that shared prefixes are neighbours.

    Args:
        layout: the units.
        blocks: the sub-layers, in the order in which they run; None for one without units.
        keep: bool [S, P] on the CPU.
    Attributes:
        leaf_of_submodel: int64 [S], which distinct sub-model each is.
        num_leaves: how many there are.
    """

    def __init__(self, layout: Layout, blocks: list[Block | None], keep: Tensor) -> None:
        self._layout, self._blocks, self._keep = layout, blocks, keep
        masks = np.zeros((len(blocks), len(keep)), dtype=np.int64)
        # a sub-model that has each of a sub-layer's masks
        self._owner: list[NDArray[np.int64]] = []
        for level, block in enumerate(blocks):
            if block is None:
                self._owner.append(np.zeros(1, dtype=np.int64))
                continue
            owner, masks[level] = _distinct(layout.keep_of_block(block, keep))
            self._owner.append(owner)
        order = np.lexsort(masks[::-1])
        ordered = masks[:, order]
        differs = ordered[:, 1:] != ordered[:, :-1]
        # the depth at which a sub-model leaves the one before it; len(blocks): it is the same
        depth = np.where(differs.any(axis=0), differs.argmax(axis=0), len(blocks))
        is_new = np.concatenate([[True], depth < len(blocks)])
        self._masks = ordered[:, is_new]
        self._departs = np.concatenate([[0], depth])[is_new]
        leaf = np.empty(len(keep), dtype=np.int64)
        leaf[order] = np.cumsum(is_new) - 1
        self.leaf_of_submodel = torch.from_numpy(leaf)
        self.num_leaves = int(is_new.sum())

    def kept(self, depth: int, masks: Sequence[int]) -> Tensor:
        """Some masks of a sub-layer, by number: bool [masks, query heads] or [masks, channels]."""
        block = self._blocks[depth]
        assert block is not None
        owners = torch.from_numpy(self._owner[depth][list(masks)])
        return self._layout.keep_of_block(block, self._keep, owners)

    def kept_by_all(self, depth: int) -> Tensor:
        """What every sub-model keeps that keeps anything of a sub-layer.

        Returns:
            bool [query heads] or [channels]; all True if none keeps anything.
        """
        kept = MaskTree.kept(self, depth, range(len(self._owner[depth])))
        return kept[kept.any(dim=1)].all(dim=0)

    def nodes(self, depth: int, start: int, stop: int) -> Iterator[Node]:
        """Nodes before sub-layer `depth` among the leaves start..stop-1; slots count from start."""
        departs, masks = self._departs[start:stop], self._masks[depth, start:stop]
        begins = np.flatnonzero(departs < depth)
        if len(begins) == 0 or begins[0] != 0:
            begins = np.concatenate([[0], begins])
        for begin, end in zip(begins, [*begins[1:], stop - start], strict=True):
            slots = [begin, *(begin + 1 + np.flatnonzero(departs[begin + 1 : end] <= depth))]
            yield Node(int(begin), tuple((int(masks[slot]), int(slot)) for slot in slots))


def _distinct(keep: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that are first of their kind, in the rows' own order, and the kind of every row.

    What `np.unique` over rows gives, in a small part of its time.
    """
    rows = [row.tobytes() for row in np.packbits(keep.numpy(), axis=1)]
    first: dict[bytes, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row, number)
    kinds = sorted(first)
    kind_of = {row: kind for kind, row in enumerate(kinds)}
    return np.array([first[row] for row in kinds]), np.array([kind_of[row] for row in rows])
