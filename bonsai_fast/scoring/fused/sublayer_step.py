"""One sub-layer on the hidden states of a wave."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.scoring.fused.arithmetic.row_masks import WHOLE, MaskTable
from bonsai_fast.scoring.fused.mask_tree import Branch
from bonsai_fast.scoring.fused.operands.gather import Bank
from bonsai_fast.scoring.fused.operands.operands import Operands, dense
from bonsai_fast.scoring.fused.operands.packed import slice_order
from bonsai_fast.scoring.fused.operands.slices import sliced
from bonsai_fast.scoring.fused.parent import MLP, Attention, Removed
from bonsai_fast.scoring.fused.routing import Copied, Fork, RoutePlan, Router
from bonsai_fast.scoring.fused.row_batches import RowBatches
from bonsai_fast.scoring.fused.split import Split, split
from bonsai_fast.scoring.fused.sublayers import inner, project_out
from bonsai_fast.scoring.fused.wave import Wave


def run_sublayer(wave: Wave, depth: int, states: Tensor) -> None:
    """Update the states of a wave by one sub-layer, in place.

    Before sub-layer `depth`, the slots of its nodes hold states; after the last one, all slots do.

    Args:
        wave: the wave.
        depth: of the sub-layer.
        states: [leaves, B, T, D], from `Wave.embed`.
    """
    sublayer = wave.structure.sublayers[depth]
    if not isinstance(sublayer, Removed):
        _SublayerStep(wave, depth, sublayer, states).run()
    elif sublayer.bias is not None:
        for node in wave.tree.nodes(depth, wave.leaves):
            states[node.slot] += sublayer.bias


class _SublayerStep:
    def __init__(self, wave: Wave, depth: int, sublayer: Attention | MLP, states: Tensor) -> None:
        self._wave, self._sublayer, self._states = wave, sublayer, states
        self._arithmetic = wave.arithmetic
        self._batches = RowBatches(states, wave.chunk_rows, wave.arithmetic)
        self._bank: Bank | None = None
        self._split: Split | None = None
        if wave.route == "split":
            self._split = split(sublayer, wave.positions, wave.arithmetic)
        self._router = Router(
            wave, depth, sublayer, states.shape[1], is_split=self._split is not None
        )

    def run(self) -> None:
        plan = self._router.plan()
        for branch in plan.skipped:
            self._add_bias(self._states[branch.slot])
        self._run_dense(plan)
        for fork in plan.gathered_forks:
            if self._split is not None:
                self._fork_split(fork, self._split)
            else:
                union = fork.kept.any(dim=0)
                operands = self._gathering.operands(union[None], None)
                self._fork(fork._replace(kept=fork.kept[:, union]), operands)
        self._run_gathered(plan.gathered)
        if plan.copied:
            self._run_copied(plan.copied)

    def _run_dense(self, plan: RoutePlan) -> None:
        # 8-bit copies of these weights are freed before those of slices are made
        weights = dense(self._sublayer)
        for fork in plan.dense_forks:
            self._fork(fork, weights)
        self._run_branches(plan.dense, weights)

    def _run_copied(self, copied: list[Copied]) -> None:
        keep = torch.stack([parts for parts, _ in copied])
        slices = sliced(self._sublayer, keep, self._arithmetic)
        for (parts, use), operands in zip(copied, slices, strict=True):
            if isinstance(use, Fork):
                order = slice_order(self._sublayer, parts)
                self._fork(use._replace(kept=use.kept[:, order]), operands)
            else:
                self._run_branches(use, operands)

    def _fork(self, fork: Fork, operands: Operands) -> None:
        """Compute a fork on weights of exactly those parts that `fork.kept` has columns for."""
        # operands may be padded with parts that give 0
        padding = operands.columns // self._sublayer.block.part_width - fork.kept.shape[1]
        removed = self._columns(~F.pad(fork.kept, (0, padding)))
        is_empty = (~fork.kept.any(dim=1)).tolist()
        for here, source in self._batches.of_slot(fork.node.slot):
            inputs = inner(operands, source, self._wave.positions, self._arithmetic)
            # the first child is stored in the node's own slot, which the others still read
            children = list(range(len(fork.node.children)))[::-1]
            together = max(1, self._batches.chunk_rows // len(source))
            for first in range(0, len(children), together):
                some = children[first : first + together]
                changes = self._changes(operands, inputs, removed[some])
                for child, change in zip(some, changes, strict=True):
                    target = self._states[fork.node.children[child].slot, here]
                    self._store(target, source, None if is_empty[child] else change)

    def _fork_split(self, fork: Fork, split: Split) -> None:
        """Compute a fork of a sub-layer in two parts; the fixed part is computed once."""
        is_empty = (~fork.kept.any(dim=1)).tolist()
        for here, source in self._batches.of_slot(fork.node.slot):
            shared = split.shared(source, self._out(len(source)))
            # the first child is stored in the node's own slot, which the others still read
            for child in reversed(range(len(fork.node.children))):
                change = None
                if not is_empty[child]:
                    change = split.change(*shared, fork.kept[child : child + 1], [len(source)])
                self._store(self._states[fork.node.children[child].slot, here], source, change)

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
        for source, masks in self._batches.of_branches(branches):
            on_rows = table.of_rows(masks)
            inputs = inner(operands, source, self._wave.positions, self._arithmetic, on_rows)
            source.add_(project_out(operands, inputs, self._out(len(source)), self._arithmetic))

    def _run_gathered(self, branches: list[Branch]) -> None:
        """Compute branches by kernels, on what the masks of each chunk keep."""
        for source, masks in self._batches.of_branches(branches):
            # adjacent rows of one mask are one group
            runs = [(mask, len(list(rows))) for mask, rows in groupby(masks)]
            keep, counts = self._router.kept([mask for mask, _ in runs]), [n for _, n in runs]
            if self._split is not None:
                shared = self._split.shared(source, self._out(len(source)))
                source.add_(self._split.change(*shared, keep, counts))
            else:
                operands = self._gathering.operands(keep, counts)
                inputs = inner(operands, source, self._wave.positions, self._arithmetic)
                source.add_(operands.project_out(inputs))

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

    def _store(self, target: Tensor, source: Tensor, change: Tensor | None) -> None:
        """Write the states of a child; None: it keeps nothing, so only the bias is added."""
        if change is None:
            target.copy_(source)
            self._add_bias(target)
        else:
            torch.add(source, change, out=target)

    def _add_bias(self, states: Tensor) -> None:
        if self._sublayer.output.bias is not None:
            states += self._sublayer.output.bias

    def _columns(self, removed: Tensor) -> Tensor:
        """Parts, bool [..., parts] -> columns of the output projection, on the device."""
        width = self._sublayer.block.part_width
        return removed.repeat_interleave(width, dim=-1).to(self._states.device)
