"""One sub-layer on the hidden states of a wave."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.row_masks import WHOLE, MaskTable
from bonsai_fast.scoring.fused.mask_tree import Branch
from bonsai_fast.scoring.fused.operands.gather import Bank
from bonsai_fast.scoring.fused.operands.operands import Operands, dense
from bonsai_fast.scoring.fused.operands.packed import slice_order
from bonsai_fast.scoring.fused.operands.slices import sliced
from bonsai_fast.scoring.fused.own_outputs import OwnOutputs
from bonsai_fast.scoring.fused.parent import MLP, Attention, Removed, SubLayer
from bonsai_fast.scoring.fused.routing import Copied, Fork, RoutePlan, Router
from bonsai_fast.scoring.fused.row_batches import RowBatches
from bonsai_fast.scoring.fused.split import Split, split
from bonsai_fast.scoring.fused.sublayers import finish, inner, project_out
from bonsai_fast.scoring.fused.wave import Wave


def run_sublayer(wave: Wave, depth: int, states: Tensor) -> None:
    """Update the states of a wave by one sub-layer, in place.

    Before sub-layer `depth`, the slots of its nodes hold states; after the last one, all slots do.

    Args:
        wave: the wave.
        depth: of the sub-layer.
        states: [leaves, B, T, D], from `Wave.embed`.
    """
    inputs = None
    if wave.structure.parallel:
        inputs = _parallel_inputs(wave, depth, states)
    sublayer = wave.structure.sublayers[depth]
    if not isinstance(sublayer, Removed):
        _SublayerStep(wave, depth, sublayer, states, inputs).run()
        return
    change = _of_bias(sublayer, sublayer.bias, wave.arithmetic)
    if change is not None:
        for node in wave.tree.nodes(depth, wave.leaves):
            states[node.slot] += change


def _parallel_inputs(wave: Wave, depth: int, states: Tensor) -> Tensor | None:
    """What a sub-layer of a parallel layer reads: an MLP, what its layer's attention read."""
    inputs = wave.arithmetic.buffer("layer inputs", *states.shape)
    if depth % 2:
        return inputs
    for node in wave.tree.nodes(depth, wave.leaves):
        for child in node.children:
            inputs[child.slot] = states[node.slot]
    return None


def _of_bias(sublayer: SubLayer, bias: Tensor | None, arithmetic: Arithmetic) -> Tensor | None:
    """What a sub-layer adds whose output projection gives nothing but its bias: [D]."""
    norm = sublayer.post_norm
    if bias is None:
        return None if norm is None else norm.bias
    return finish(sublayer, bias.clone(), arithmetic)


class _SublayerStep:
    def __init__(
        self,
        wave: Wave,
        depth: int,
        sublayer: Attention | MLP,
        states: Tensor,
        inputs: Tensor | None,
    ) -> None:
        self._wave, self._sublayer, self._states = wave, sublayer, states
        self._arithmetic = wave.arithmetic
        self._batches = RowBatches(states, wave.chunk_rows, wave.arithmetic, inputs)
        self._bank: Bank | None = None
        self._split: Split | None = None
        if wave.route == "split":
            self._split = split(sublayer, wave.positions, wave.arithmetic)
        self._own: OwnOutputs | None = None
        if wave.outputs is not None:
            self._own = OwnOutputs(wave, wave.outputs, depth, sublayer)
        self._router = Router(
            wave, depth, sublayer, states.shape[1], is_split=self._split is not None, own=self._own
        )

    def run(self) -> None:
        plan = self._router.plan()
        for branch in plan.skipped:
            self._add_bias(self._states[branch.slot], branch.mask)
        self._run_dense(plan)
        for fork in plan.gathered_forks:
            if self._split is not None:
                self._fork_split(fork, self._split)
            else:
                union = fork.kept.any(dim=0)
                operands = self._gathering.operands(union[None], None)
                self._fork(fork, operands, union.nonzero().flatten())
        self._run_gathered(plan.gathered)
        if plan.copied:
            self._run_copied(plan.copied)

    def _run_dense(self, plan: RoutePlan) -> None:
        # 8-bit copies of these weights are freed before those of slices are made
        weights = dense(self._sublayer)
        everything = torch.arange(self._sublayer.num_parts)
        for fork in plan.dense_forks:
            self._fork(fork, weights, everything)
        self._run_branches(plan.dense, weights)
        self._run_own(plan.own, weights, everything)

    def _run_copied(self, copied: list[Copied]) -> None:
        keep = torch.stack([parts for parts, _ in copied])
        slices = sliced(self._sublayer, keep, self._arithmetic)
        for (parts, use), operands in zip(copied, slices, strict=True):
            order = slice_order(self._sublayer, parts)
            if isinstance(use, Fork):
                self._fork(use, operands, order)
            elif self._own_of(use[0].mask) is not None:
                self._run_own(use, operands, order)
            else:
                self._run_branches([Branch(slot, WHOLE) for slot, _ in use], operands)

    def _fork(self, fork: Fork, operands: Operands, computed: Tensor) -> None:
        """Compute a fork on weights of some parts, int64 [n], in this order."""
        kept = fork.kept[:, computed]
        # operands may be padded with parts that give 0
        padding = operands.columns // self._sublayer.block.part_width - kept.shape[1]
        removed = self._columns(~F.pad(kept, (0, padding)))
        is_empty = (~kept.any(dim=1)).tolist()
        branches = fork.node.children
        # the first child is stored in the node's own slot, which the others still read
        children = list(range(len(branches)))[::-1]
        groups = [children]
        if self._own is not None:
            groups = self._own.held_together(children, [branch.mask for branch in branches])
        for group in groups:
            for here, states, source in self._batches.of_slot(fork.node.slot):
                inputs = inner(operands, source, self._wave.positions, self._arithmetic)
                for some in self._together(group, len(source)):
                    mask = branches[some[0]].mask
                    if self._own_of(mask) is None:
                        changes = self._changes(operands, inputs, removed[some])
                    else:
                        changes = self._own_changes(inputs, [mask] * len(source), computed)[None]
                    changes = self._finish(changes)
                    for child, change in zip(some, changes, strict=True):
                        found = None if is_empty[child] else change
                        self._store(branches[child], here, states, found)

    def _together(self, children: list[int], rows: int) -> list[list[int]]:
        """Cut children of a fork, which have `rows` rows each, into those with one product."""
        size = max(1, self._batches.chunk_rows // rows) if self._own is None else 1
        return [children[first : first + size] for first in range(0, len(children), size)]

    def _fork_split(self, fork: Fork, split: Split) -> None:
        """Compute a fork of a sub-layer in two parts; the fixed part is computed once."""
        is_empty = (~fork.kept.any(dim=1)).tolist()
        for here, states, source in self._batches.of_slot(fork.node.slot):
            shared = split.shared(source, self._out(len(source)))
            # the first child is stored in the node's own slot, which the others still read
            for child, branch in reversed(list(enumerate(fork.node.children))):
                change = None
                if not is_empty[child]:
                    kept = fork.kept[child : child + 1]
                    change = self._finish(split.change(*shared, kept, [len(source)]))
                self._store(branch, here, states, change)

    def _changes(self, operands: Operands, inputs: Tensor, removed: Tensor) -> Tensor:
        """What several masks make of the same inputs: [masks, R, T, D]."""
        count, (rows, length, width) = len(removed), inputs.shape
        masked = self._arithmetic.buffer("second", count, rows, length, width)
        torch.where(removed[:, None, None], inputs.new_zeros(()), inputs, out=masked)
        out = self._out(count * rows)
        changes = project_out(operands, masked.flatten(0, 1), out, self._arithmetic)
        return changes.view(count, *inputs.shape[:2], -1)

    def _run_branches(self, branches: list[Branch], operands: Operands) -> None:
        """Compute branches on some weights, each row under its own mask of these."""
        if not branches:
            return
        table = self._table([branch.mask for branch in branches])
        for states, source, masks in self._batches.of_branches(branches):
            on_rows = table.of_rows(masks)
            inputs = inner(operands, source, self._wave.positions, self._arithmetic, on_rows)
            change = project_out(operands, inputs, self._out(len(source)), self._arithmetic)
            states.add_(self._finish(change))

    def _run_own(self, branches: list[Branch], operands: Operands, computed: Tensor) -> None:
        """Compute branches with their own output projections; those of a mask are neighbours.

        Args:
            branches: the branches.
            operands: weights.
            computed: int64 [n], the parts that these are of, in their order.
        """
        for states, source, masks in self._batches.of_branches(branches):
            inputs = inner(operands, source, self._wave.positions, self._arithmetic)
            states.add_(self._finish(self._own_changes(inputs, masks, computed)))

    def _run_gathered(self, branches: list[Branch]) -> None:
        """Compute branches by kernels, on what the masks of each chunk keep."""
        for states, source, masks in self._batches.of_branches(branches):
            # adjacent rows of one mask are one group
            runs = [(mask, len(list(rows))) for mask, rows in groupby(masks)]
            keep, counts = self._router.kept([mask for mask, _ in runs]), [n for _, n in runs]
            if self._split is not None:
                shared = self._split.shared(source, self._out(len(source)))
                change = self._split.change(*shared, keep, counts)
            else:
                operands = self._gathering.operands(keep, counts)
                inputs = inner(operands, source, self._wave.positions, self._arithmetic)
                if self._own_of(masks[0]) is None:
                    change = operands.project_out(inputs)
                else:
                    change = self._own_changes(inputs, masks, None)
            states.add_(self._finish(change))

    def _finish(self, change: Tensor) -> Tensor:
        return finish(self._sublayer, change, self._arithmetic)

    def _own_changes(self, inputs: Tensor, masks: list[int], computed: Tensor | None) -> Tensor:
        """What the own projections of each row's mask make of [R, T, columns]: [R, T, D].

        Args:
            inputs: of the output projection.
            masks: the mask of each row; equal ones are neighbours.
            computed: int64 [n], the parts that inputs are of; None: those that each mask keeps.
        """
        assert self._own is not None
        out, start = self._out(len(inputs)), 0
        for mask, rows in groupby(masks):
            here = slice(start, start + len(list(rows)))
            parts = (
                self._router.kept([mask])[0].nonzero().flatten() if computed is None else computed
            )
            self._own.project(mask, inputs[here], parts, out[here])
            start = here.stop
        return out

    def _own_of(self, mask: int) -> OwnOutputs | None:
        """Where the own output projection of a mask comes from; None: it has the parent's."""
        own = self._own
        return own if own is not None and own.belongs_to(mask) else None

    @property
    def _gathering(self) -> Bank:
        if self._bank is None:
            self._bank = Bank(self._sublayer, self._arithmetic)
        return self._bank

    def _table(self, masks: list[int]) -> MaskTable:
        different = sorted(set(masks) - {WHOLE})
        width = self._sublayer.block.part_width
        return MaskTable(different, self._router.kept(different), width, self._states.device)

    def _out(self, rows: int) -> Tensor:
        return self._arithmetic.buffer("out", rows, *self._states.shape[2:])

    def _store(self, child: Branch, here: slice, states: Tensor, change: Tensor | None) -> None:
        """Write the states of a child; None: it keeps nothing, so only the bias is added."""
        target = self._states[child.slot, here]
        if change is None:
            target.copy_(states)
            self._add_bias(target, child.mask)
        else:
            torch.add(states, change, out=target)

    def _add_bias(self, states: Tensor, mask: int) -> None:
        own = self._own_of(mask)
        bias = self._sublayer.output.bias if own is None else own.of(mask).bias
        change = _of_bias(self._sublayer, bias, self._arithmetic)
        if change is not None:
            states += change

    def _columns(self, removed: Tensor) -> Tensor:
        """Parts, bool [..., parts] -> columns of the output projection, on the device."""
        width = self._sublayer.block.part_width
        return removed.repeat_interleave(width, dim=-1).to(self._states.device)
