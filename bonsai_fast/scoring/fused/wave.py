"""One wave: the rows of some sub-models and sequences go through all sub-layers together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.config.choices import ConcreteRoute, Route
from bonsai_fast.models import AttentionBlock
from bonsai_fast.scoring.fused.arithmetic.products import Multiply, full
from bonsai_fast.scoring.fused.arithmetic.row_masks import WHOLE, MaskTable, RowMasks
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.choose_route import choose
from bonsai_fast.scoring.fused.mask_tree import MaskTree, Node
from bonsai_fast.scoring.fused.operands.gather import Bank, gathers
from bonsai_fast.scoring.fused.operands.operands import Operands, dense
from bonsai_fast.scoring.fused.operands.packed import PackedMLP, slice_order
from bonsai_fast.scoring.fused.operands.slices import sliced
from bonsai_fast.scoring.fused.parent import MLP, Attention, Removed, Structure
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.fused.split import Split, split
from bonsai_fast.scoring.fused.sublayers import inner, project_out


@dataclass(frozen=True, eq=False)
class Wave:
    """Leaves start..stop-1 of a tree on some sequences.

    Attributes:
        structure: the model.
        tree: of its sub-models.
        start, stop: which of its leaves.
        positions: of the sequences' length.
        chunk_rows: (sub-model, sequence) pairs that go through a sub-layer at once.
        route: see `policy`.
        workspace: shared by all waves.
        multiply: how products are taken.
        kernels: whether the project's own ops do what PyTorch's functions could do as well.
    """

    structure: Structure
    tree: MaskTree
    start: int
    stop: int
    positions: Positions
    chunk_rows: int
    route: Route
    workspace: Workspace
    kernels: bool = False
    multiply: Multiply = full

    def embed(self, input_ids: Tensor) -> Tensor:
        """Where the states of all leaves are going to be: [leaves, B, T, D].

        Args:
            input_ids: int64 [B, T] on the device.
        """
        embedded: Tensor = self.structure.embedding(input_ids)
        states = self.workspace("states", self.stop - self.start, *embedded.shape)
        states[0] = embedded
        return states

    def step(self, depth: int, states: Tensor) -> None:
        """Run sub-layer `depth`; behind the last one, the states of every leaf are there."""
        sublayer = self.structure.sublayers[depth]
        nodes = list(self.tree.nodes(depth, self.start, self.stop))
        if isinstance(sublayer, Removed):
            if sublayer.bias is not None:
                for node in nodes:
                    states[node.slot] += sublayer.bias
            return
        _Step(self, depth, sublayer, states).advance(nodes)


class _Step:
    """One sub-layer on the states of one wave."""

    def __init__(self, wave: Wave, depth: int, sublayer: Attention | MLP, states: Tensor) -> None:
        self.wave, self.depth, self.sublayer = wave, depth, sublayer
        self.states = states
        self.rows = states.flatten(0, 1)  # [leaves * B, T, D]
        self.sequences, self.length = states.shape[1:3]
        self._bank: Bank | None = None
        self._split: Split | None = None
        if wave.route == "split":
            self._split = split(
                *(sublayer, wave.positions, wave.workspace, wave.multiply), kernels=wave.kernels
            )

    def advance(self, nodes: list[Node]) -> None:
        """Nodes whose sub-models part here one by one; of the others, those of one mask together,
        or all that run densely, or all that are gathered."""
        whole_weights = dense(self.sublayer)
        slots_of_mask: dict[int, list[int]] = defaultdict(list)
        copies: list[tuple[Tensor, Callable[[Operands], None]]] = []
        for node in nodes:
            if len(node.children) == 1:
                slots_of_mask[node.children[0][0]].append(node.slot)
                continue
            kept = self._kept([mask for mask, _ in node.children])
            if self._split is not None:
                self._fork_split(node, kept, self._split)
                continue
            union = kept.any(dim=0)
            route = self._route(int(union.sum()), self.sequences)
            if route == "slice":
                order = slice_order(self.sublayer, union)
                copies.append((union, partial(self._fork, node, kept[:, order])))
            elif route == "gather":
                self._fork(node, kept[:, union], self._gathering.operands(union[None], None))
            else:
                self._fork(node, kept, whole_weights)
        masks = list(slots_of_mask)
        sizes = self._kept(masks).sum(dim=1).tolist()
        whole: list[tuple[int, int]] = []
        gathered: list[tuple[int, int]] = []
        for mask, size in zip(masks, sizes, strict=True):
            slots = slots_of_mask[mask]
            if size == 0:
                for slot in slots:
                    self._add_bias(self.states[slot])
                continue
            route = self._route(size, len(slots) * self.sequences)
            if route == "slice":
                alone = [(slot, WHOLE) for slot in slots]
                copies.append((self._kept([mask])[0], partial(self._run, alone)))
            elif route == "gather":
                gathered += [(slot, mask) for slot in slots]
            else:
                whole += [(slot, mask if size < self._num_parts else WHOLE) for slot in slots]
        self._run(sorted(whole), whole_weights)
        # what was made of them makes room for what is made of copies
        del whole_weights
        self._run(gathered, None)
        if copies:
            self._run_copies(copies)

    def _run_copies(self, copies: list[tuple[Tensor, Callable[[Operands], None]]]) -> None:
        keep = torch.stack([keep for keep, _ in copies])
        slices = sliced(self.sublayer, keep, self.wave.workspace, kernels=self.wave.kernels)
        for (_, use), operands in zip(copies, slices, strict=True):
            use(operands)

    def _fork(self, node: Node, kept: Tensor, operands: Operands) -> None:
        """A node whose sub-models part here: what flows into the output projection is shared.

        Args:
            node: the node.
            kept: bool [children, parts of the operands].
            operands: all that any child keeps.
        """
        wave = self.wave
        # operands may be padded, by parts that give 0
        padding = operands.columns // self.sublayer.block.part_width - kept.shape[1]
        removed = self._columns(~F.pad(kept, (0, padding)))
        empty = (~kept.any(dim=1)).tolist()
        for begin in range(0, self.sequences, wave.chunk_rows):
            here = slice(begin, min(begin + wave.chunk_rows, self.sequences))
            source = self.states[node.slot, here]
            inputs = self._inner(operands, source, None)
            # the first child has the node's own slot, which the others read: it comes last
            children = list(range(len(node.children)))[::-1]
            together = max(1, wave.chunk_rows // len(source))
            for first in range(0, len(children), together):
                some = children[first : first + together]
                changes = self._changes(operands, inputs, removed[some])
                for child, change in zip(some, changes, strict=True):
                    target = self.states[node.children[child][1], here]
                    if empty[child]:
                        target.copy_(source)
                        self._add_bias(target)
                    else:
                        torch.add(source, change, out=target)

    def _fork_split(self, node: Node, kept: Tensor, split: Split) -> None:
        """The same where what all keep is a product of its own, which they share.

        Args:
            node: the node.
            kept: bool [children, parts].
            split: the sub-layer.
        """
        empty = (~kept.any(dim=1)).tolist()
        for begin in range(0, self.sequences, self.wave.chunk_rows):
            here = slice(begin, min(begin + self.wave.chunk_rows, self.sequences))
            source = self.states[node.slot, here]
            shared = split.shared(source, self._out(len(source)))
            # the first child has the node's own slot, which the others read: it comes last
            for child in reversed(range(len(node.children))):
                target = self.states[node.children[child][1], here]
                if empty[child]:
                    target.copy_(source)
                    self._add_bias(target)
                else:
                    change = split.change(*shared, kept[child : child + 1], [len(source)])
                    torch.add(source, change, out=target)

    def _changes(self, operands: Operands, inputs: Tensor, removed: Tensor) -> Tensor:
        """What several masks make of the same inputs: [masks, R, T, D]."""
        count, (rows, length, width) = len(removed), inputs.shape
        masked = self.wave.workspace("second", count, rows, length, width)
        torch.where(removed[:, None, None], inputs.new_zeros(()), inputs, out=masked)
        out = self._out(count * rows)
        changes = self._project_out(operands, masked.flatten(0, 1), out)
        return changes.view(count, *inputs.shape[:2], -1)

    def _run(self, nodes: list[tuple[int, int]], operands: Operands | None) -> None:
        """Advance nodes, each a slot and the mask to be put on it, a chunk of rows at a time.

        Without operands what each chunk's masks keep is gathered, of all parts or, where the
        sub-layer is split, of its candidates; nodes of one mask are neighbours.
        """
        wave, sequences = self.wave, self.sequences
        table = None if operands is None else self._table([mask for _, mask in nodes])
        rows = [slot * sequences + number for slot, _ in nodes for number in range(sequences)]
        for begin in range(0, len(rows), wave.chunk_rows):
            chunk = rows[begin : begin + wave.chunk_rows]
            masks = [nodes[(begin + place) // sequences][1] for place in range(len(chunk))]
            adjacent = chunk == list(range(chunk[0], chunk[0] + len(chunk)))
            if adjacent:
                source = self.rows[chunk[0] : chunk[-1] + 1]
            else:
                index = torch.tensor(chunk, device=self.rows.device)
                source = wave.workspace("gathered", len(chunk), *self.rows.shape[1:])
                torch.index_select(self.rows, 0, index, out=source)
            on_rows = None if table is None else table.of_rows(masks)
            source.add_(self._change(operands, source, masks, on_rows))
            if not adjacent:
                self.rows.index_copy_(0, index, source)

    def _change(
        self, operands: Operands | None, source: Tensor, masks: list[int], on_rows: RowMasks | None
    ) -> Tensor:
        """What the sub-layer adds to rows that have these masks, as `_run` has it: a new tensor or
        one in the workspace."""
        out = self._out(len(source))
        if operands is None:
            # equal ones side by side are one group of rows
            runs = [(mask, len(list(rows))) for mask, rows in groupby(masks)]
            keep, counts = self._kept([mask for mask, _ in runs]), [count for _, count in runs]
            if self._split is not None:
                return self._split.change(*self._split.shared(source, out), keep, counts)
            operands = self._gathering.operands(keep, counts)
        inputs = self._inner(operands, source, on_rows)
        return self._project_out(operands, inputs, out)

    def _inner(self, operands: Operands, source: Tensor, masks: RowMasks | None) -> Tensor:
        wave = self.wave
        return inner(
            *(operands, source, wave.positions, wave.workspace, masks),
            multiply=wave.multiply,
            kernels=wave.kernels,
        )

    def _project_out(self, operands: Operands, inputs: Tensor, out: Tensor) -> Tensor:
        return project_out(operands, inputs, out, self.wave.workspace, self.wave.multiply)

    @property
    def _gathering(self) -> Bank:
        if self._bank is None:
            self._bank = Bank(self.sublayer, self.wave.workspace)
        return self._bank

    def _table(self, masks: list[int]) -> MaskTable:
        different = sorted(set(masks) - {WHOLE})
        width = self.sublayer.block.part_width
        return MaskTable(different, self._kept(different), width, self.rows.device)

    def _out(self, rows: int) -> Tensor:
        return self.wave.workspace("out", rows, *self.rows.shape[1:])

    def _add_bias(self, states: Tensor) -> None:
        if self.sublayer.output.bias is not None:
            states += self.sublayer.output.bias

    def _columns(self, removed: Tensor) -> Tensor:
        """Parts, bool [..., parts] -> columns of the output projection, on the device."""
        block = self.sublayer.block
        return removed.repeat_interleave(block.part_width, dim=-1).to(self.rows.device)

    @property
    def _num_parts(self) -> int:
        block = self.sublayer.block
        return block.num_heads if isinstance(block, AttentionBlock) else block.num_channels

    def _kept(self, masks: list[int]) -> Tensor:
        return self.wave.tree.kept(self.depth, masks)

    def _route(self, kept: int, rows: int) -> ConcreteRoute:
        """How so many kept parts are computed for so many rows."""
        if self._split is not None:
            return "gather"
        if kept == self._num_parts:
            return "dense"
        copied = None
        if isinstance(self.sublayer, PackedMLP):
            fixed = self._num_parts - self.sublayer.candidates
            copied = (kept - fixed) / self._num_parts
        share, low = kept / self._num_parts, self.wave.multiply is not full
        route = choose(self.wave.route, share, rows * self.length, copied, low=low)
        return "dense" if route == "gather" and not gathers(self.sublayer) else route
