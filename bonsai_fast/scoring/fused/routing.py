"""Which route each sub-model of a wave takes through one sub-layer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from bonsai_fast.config.choices import ConcreteRoute
from bonsai_fast.scoring.fused.arithmetic.row_masks import WHOLE
from bonsai_fast.scoring.fused.choose_route import choose
from bonsai_fast.scoring.fused.mask_tree import Branch, Node
from bonsai_fast.scoring.fused.operands.gather import gathers
from bonsai_fast.scoring.fused.operands.packed import PackedMLP
from bonsai_fast.scoring.fused.own_outputs import OwnOutputs
from bonsai_fast.scoring.fused.parent import MLP, Attention
from bonsai_fast.scoring.fused.wave import Wave


class Fork(NamedTuple):
    """A node whose children keep different parts; everything before the output projection is
    computed once for all of them.

    Attributes:
        node: the node.
        kept: bool [children, parts], what each child keeps.
    """

    node: Node
    kept: Tensor


class Copied(NamedTuple):
    """What is computed on a copy of some parts.

    Attributes:
        parts: bool [parts], what is copied.
        use: a fork, or branches of one mask, which keeps exactly these parts.
    """

    parts: Tensor
    use: Fork | list[Branch]


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """How the sub-models of a wave pass one sub-layer.

    Attributes:
        dense_forks, gathered_forks: forks on the whole sub-layer, or by kernels.
        dense: branches on the whole sub-layer, in the order of their slots.
        own: branches on the whole sub-layer up to an output projection of their own; those of one
            mask are neighbours.
        gathered: branches by kernels; those of one mask are neighbours.
        copied: forks and branches on copies of the parts that they keep.
        skipped: branches that keep nothing; only the output bias is added.
    """

    dense_forks: list[Fork] = field(default_factory=list)
    gathered_forks: list[Fork] = field(default_factory=list)
    dense: list[Branch] = field(default_factory=list)
    own: list[Branch] = field(default_factory=list)
    gathered: list[Branch] = field(default_factory=list)
    copied: list[Copied] = field(default_factory=list)
    skipped: list[Branch] = field(default_factory=list)


class Router:
    """Chooses routes in one sub-layer of a wave.

    Args:
        wave: the wave.
        depth: of the sub-layer.
        sublayer: the sub-layer.
        sequences: number of sequences of the wave.
        is_split: whether the sub-layer is computed in two parts; see `split`.
        own: output projections of masks that have their own; None: none has.
    """

    def __init__(
        self,
        wave: Wave,
        depth: int,
        sublayer: Attention | MLP,
        sequences: int,
        *,
        is_split: bool,
        own: OwnOutputs | None = None,
    ) -> None:
        self._wave, self._depth, self._sublayer = wave, depth, sublayer
        self._sequences, self._is_split, self._own = sequences, is_split, own

    def plan(self) -> RoutePlan:
        """Routes of all sub-models of the wave."""
        plan = RoutePlan()
        slots_of_mask: dict[int, list[int]] = defaultdict(list)
        for node in self._wave.tree.nodes(self._depth, self._wave.leaves):
            if len(node.children) == 1:
                slots_of_mask[node.children[0].mask].append(node.slot)
            else:
                masks = [child.mask for child in node.children]
                self._place_fork(plan, Fork(node, self.kept(masks)))
        masks = list(slots_of_mask)
        kept = self.kept(masks)
        for mask, parts, size in zip(masks, kept, kept.sum(dim=1).tolist(), strict=True):
            branches = [Branch(slot, mask) for slot in slots_of_mask[mask]]
            self._place_branches(plan, branches, parts, size)
        plan.dense.sort()
        return plan

    def kept(self, masks: list[int]) -> Tensor:
        """What masks keep, by number: bool [masks, parts]."""
        return self._wave.tree.kept(self._depth, masks)

    def _place_fork(self, plan: RoutePlan, fork: Fork) -> None:
        union = fork.kept.any(dim=0)
        route = self._route(int(union.sum()), self._sequences)
        if route == "slice":
            plan.copied.append(Copied(union, fork))
        elif route == "gather":
            plan.gathered_forks.append(fork)
        else:
            plan.dense_forks.append(fork)

    def _place_branches(
        self, plan: RoutePlan, branches: list[Branch], kept: Tensor, size: int
    ) -> None:
        """Branches of one mask, which keeps `size` parts, bool [parts]."""
        if size == 0:
            plan.skipped.extend(branches)
            return
        route = self._route(size, len(branches) * self._sequences)
        if route == "slice":
            plan.copied.append(Copied(kept, branches))
        elif route == "gather":
            plan.gathered.extend(branches)
        elif self._own is not None and self._own.belongs_to(branches[0].mask):
            plan.own.extend(branches)
        elif size == self._sublayer.num_parts:
            plan.dense.extend(Branch(branch.slot, WHOLE) for branch in branches)
        else:
            plan.dense.extend(branches)

    def _route(self, size: int, rows: int) -> ConcreteRoute:
        """The route for `rows` rows that keep `size` parts."""
        total = self._sublayer.num_parts
        if self._is_split:
            return "gather"
        if size in (0, total):  # 0: sub-models that differ by the output projection's bias alone
            return "dense"
        copied_share = None
        if isinstance(self._sublayer, PackedMLP):
            # a slice copies only the candidates
            fixed = total - self._sublayer.candidates
            copied_share = (size - fixed) / total
        tokens = rows * self._wave.positions.length
        in_8_bits = self._wave.arithmetic.in_8_bits
        route = choose(self._wave.route, size / total, tokens, copied_share, low=in_8_bits)
        return "dense" if route == "gather" and not gathers(self._sublayer) else route
