"""What a unit costs: parameter counts that are kept up to date unit by unit, without a recount."""

from __future__ import annotations

import numpy as np
import torch

from bonsai_fast.models import AttentionBlock, Block, ExpertsBlock
from bonsai_fast.models.layout import Group, Layout


def group_costs(layout: Layout) -> torch.Tensor:
    """Parameters of one unit of each group while others of the group are kept, int64 [G]."""
    return torch.tensor([group.num_parameters for group in layout.groups], dtype=torch.int64)


def attention_groups(layout: Layout) -> list[Group]:
    """The groups whose units are heads or KV groups."""
    return [group for group in layout.groups if group.kind in ("head", "kv-group")]


def channel_groups(layout: Layout) -> list[Group]:
    """The groups whose units are MLP channels."""
    return [group for group in layout.groups if group.kind == "channel"]


def expert_groups(layout: Layout) -> list[Group]:
    """The groups whose units are experts."""
    return [group for group in layout.groups if group.kind == "expert"]


def drop_empty(layout: Layout, keep: torch.Tensor) -> torch.Tensor:
    """Mark all units of a sub-layer as removed if none of its parts is kept."""
    keep = keep.clone()
    empty = {id(block) for block, kept in layout.keep_by_block(keep) if not kept.any()}
    for group in layout.groups:
        if id(group.block) in empty:
            keep[group.start : group.stop] = False
    return keep


class _BlockCount:
    """One sub-layer: what its parts cost, and which of them are left."""

    def __init__(self, layout: Layout, block: Block, kept: torch.Tensor) -> None:
        self.total = layout.removed_from_block(block, torch.zeros_like(kept))
        self.removed = layout.removed_from_block(block, kept)
        self.alive = kept.tolist()
        self.num_alive = sum(self.alive)
        self.fewest = block.fewest if isinstance(block, ExpertsBlock) else 1
        self.part_cost, self.shared_cost = _part_costs(layout, block, len(kept))
        self.shared_of = block.kv_of_head if isinstance(block, AttentionBlock) else None
        self.num_sharing = [0] * len(self.shared_cost)
        if self.shared_of is not None:
            for part, shared in enumerate(self.shared_of):
                self.num_sharing[shared] += self.alive[part]

    def cost_of(self, parts: tuple[int, ...]) -> int:
        parts = tuple(part for part in parts if self.alive[part])
        if self.num_alive - len(parts) < self.fewest:
            return self.total - self.removed
        cost = sum(self.part_cost[part] for part in parts)
        if self.shared_of is not None:
            leaving = [self.shared_of[part] for part in parts]
            cost += sum(
                self.shared_cost[kv]
                for kv in set(leaving)
                if leaving.count(kv) == self.num_sharing[kv]
            )
        return cost

    def remove(self, parts: tuple[int, ...]) -> int:
        cost = self.cost_of(parts)
        for part in parts:
            if self.alive[part]:
                self.alive[part] = False
                self.num_alive -= 1
                if self.shared_of is not None:
                    self.num_sharing[self.shared_of[part]] -= 1
        self.removed += cost
        return cost


def _part_costs(layout: Layout, block: Block, num_parts: int) -> tuple[list[int], list[int]]:
    """Parameters of each query head or channel, and of each KV head that query heads share."""

    def without(*parts: int) -> int:
        kept = torch.ones(num_parts, dtype=torch.bool)
        kept[list(parts)] = False
        return layout.removed_from_block(block, kept)

    if not isinstance(block, AttentionBlock):
        return [without(0)] * num_parts, []
    cost = [without(head) for head in range(num_parts)]
    shared = []
    for kv in range(block.num_kv_heads):
        heads = [head for head, of in enumerate(block.kv_of_head) if of == kv]
        shared.append(without(*heads) - sum(cost[head] for head in heads) if len(heads) > 1 else 0)
    return cost, shared


class RemovedCount:
    """Parameters removed so far, as `Layout.num_removed_parameters` counts them, unit by unit.

    A shared KV head is removed with its last query head. Everything that only one sub-layer reads
    is removed with its last part.
    """

    def __init__(self, layout: Layout, keep: torch.Tensor) -> None:
        """Start at `keep`, bool [P]."""
        layout.check_mask(keep, dims=1)
        blocks = {
            id(block): _BlockCount(layout, block, kept)
            for block, kept in layout.keep_by_block(keep)
        }
        self._block_of_group = [blocks[id(group.block)] for group in layout.groups]
        self._starts = [group.start for group in layout.groups]
        self._parts = [_parts_of_units(group) for group in layout.groups]
        self.group_of_unit: list[int] = np.repeat(
            np.arange(len(layout.groups)), [len(group) for group in layout.groups]
        ).tolist()
        self.removed = sum(block.removed for block in blocks.values())

    def cost_of(self, unit: int) -> int:
        """Parameters that removing this unit now would remove; 0 if it is removed."""
        group = self.group_of_unit[unit]
        return self._block_of_group[group].cost_of(self._parts[group][unit - self._starts[group]])

    def remove(self, unit: int) -> None:
        """Count this unit as removed."""
        group = self.group_of_unit[unit]
        self.removed += self._block_of_group[group].remove(
            self._parts[group][unit - self._starts[group]]
        )


def _parts_of_units(group: Group) -> list[tuple[int, ...]]:
    parts: list[tuple[int, ...]] = [()] * len(group)
    for part, unit in enumerate(group.part_of_unit.tolist()):
        parts[unit] += (part,)
    return parts
