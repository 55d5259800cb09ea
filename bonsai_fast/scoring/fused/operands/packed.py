"""Sub-layers without what no sub-model of a call keeps, and in an order that makes slices cheap.

The sub-models of a round of pruning keep most units alike: those that were removed before are gone
from all, and of the others only a few candidates differ. A packed sub-layer is a copy of what any
of them keeps; of an MLP, with its candidates first, what all keep behind, and room at the end:

    [candidates | fixed | room]

Run as it is, it is a parent that was pruned before. A mask's own slice is what lies from `fixed`
on, once its candidates are copied into the room: few rows, where another slice copies them all. Or
`fixed` is one product for all masks, and kernels gather the candidates; see `split`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bonsai_fast.config.choices import Route
from bonsai_fast.models import AttentionBlock
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.choose_route import packing_pays
from bonsai_fast.scoring.fused.mask_tree import MaskTree
from bonsai_fast.scoring.fused.operands.copies import output_columns, take_blocks, take_projection
from bonsai_fast.scoring.fused.parent import (
    MLP,
    Attention,
    Projection,
    Removed,
    Structure,
    SubLayer,
)

PACKING: tuple[Route, ...] = ("auto", "pack", "tail", "split")
# fixed channels of a split MLP are a multiple of it: widths that a GPU multiplies well
FIXED_MULTIPLE = 64


@dataclass(frozen=True, eq=False)
class Pack:
    """What of a sub-layer is packed.

    Attributes:
        parts: int64 [n], the parts that any sub-model keeps, candidates first.
        candidates: how many are first; all sub-models keep the others.
    """

    parts: Tensor
    candidates: int

    @classmethod
    def of_channels(cls, used: Tensor, common: Tensor, multiple: int) -> Pack:
        """Channels of an MLP.

        Args:
            used: bool [channels], what any sub-model keeps.
            common: bool [channels], what all keep that keep any.
            multiple: where there are candidates, some that all keep join them, so that as many are
                left as it divides.
        """
        candidates = used & ~common
        if candidates.any():
            fixed = (used & common).nonzero().flatten()
            candidates[fixed[: len(fixed) % multiple]] = True
        fixed = (used & ~candidates).nonzero().flatten()
        return cls(torch.cat([candidates.nonzero().flatten(), fixed]), int(candidates.sum()))


@dataclass(frozen=True, eq=False)
class PackedMLP(MLP):
    """An MLP whose channels are packed.

    Attributes:
        candidates: its first channels; the others are kept by all sub-models that keep any.
        buffers: "gate", "up" and "output" rows [n + candidates, D], biases likewise, room included.
        gate_up: gate and up of these buffers, one below the other: [2 (n + candidates), D].
    """

    candidates: int
    buffers: Mapping[str, Tensor]
    gate_up: Projection


def packed_slices(spec: PackedMLP, keep: Tensor) -> Iterator[tuple[Projection, Projection, Tensor]]:
    """Gate, up and output rows of every mask in turn, each until the next one is asked for.

    Args:
        spec: the MLP.
        keep: bool [N, n] on the CPU; the fixed channels are kept.
    """
    count, total = spec.candidates, spec.block.num_channels
    for kept in keep:
        index = kept[:count].nonzero().flatten()
        for buffer in spec.buffers.values():
            room = buffer[total : total + len(index)]
            torch.index_select(buffer[:count], 0, index.to(buffer.device), out=room)
        stop = total + len(index)
        part = {name: buffer[count:stop] for name, buffer in spec.buffers.items()}
        gate, up = (Projection(part[name], part.get(f"{name} bias")) for name in ("gate", "up"))
        yield gate, up, part["output"]


def slice_order(spec: Attention | MLP, kept: Tensor) -> Tensor:
    """Kept parts in the order in which they lie in a slice: int64 [n].

    Args:
        spec: the sub-layer.
        kept: bool [parts].
    """
    index = kept.nonzero().flatten()
    if isinstance(spec, PackedMLP):
        varies = index < spec.candidates
        index = torch.cat([index[~varies], index[varies]])
    return index


class PackedTree(MaskTree):
    """A tree whose masks are those of packed sub-layers.

    Args:
        tree: of the whole sub-layers.
        packs: by depth.
    """

    def __init__(self, tree: MaskTree, packs: Mapping[int, Pack]) -> None:
        vars(self).update(vars(tree))
        self._packs = packs

    def kept(self, depth: int, masks: Sequence[int]) -> Tensor:
        """See `MaskTree.kept`; of the parts that are packed, in their order."""
        found = super().kept(depth, masks)
        pack = self._packs.get(depth)
        return found if pack is None else found[:, pack.parts]


class PackedSublayers(Sequence[SubLayer]):
    """Sub-layers that are packed when they are asked for, until the next one is.

    Args:
        whole: the sub-layers.
        packs: by depth; the others stay as they are.
        workspace: holds the copies.
        contiguous: whether output projections must be [D, columns] in memory, for kernels.
    """

    def __init__(
        self,
        whole: Sequence[SubLayer],
        packs: Mapping[int, Pack],
        workspace: Workspace,
        *,
        contiguous: bool,
    ) -> None:
        self._whole, self._packs = whole, packs
        self._workspace, self._contiguous = workspace, contiguous

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, depth):  # type: ignore[no-untyped-def]
        spec, pack = self._whole[depth], self._packs.get(depth)
        if pack is None or isinstance(spec, Removed):
            return spec
        if len(pack.parts) == 0:
            return Removed(spec.output.bias)
        return self._mlp(spec, pack) if isinstance(spec, MLP) else self._attention(spec, pack)

    def _mlp(self, spec: MLP, pack: Pack) -> PackedMLP:
        total, width = len(pack.parts), spec.norm.weight.shape[0]
        rows = total + pack.candidates
        gate_up = Projection(self._workspace("packed gate and up", 2 * rows, width), None)
        sources = {
            "gate": spec.gate.weight,
            "up": spec.up.weight,
            "output": output_columns(spec, self._workspace),
        }
        buffers = {"gate": gate_up.weight[:rows], "up": gate_up.weight[rows:]}
        buffers["output"] = self._workspace("packed output", rows, width)
        if spec.gate.bias is not None or spec.up.bias is not None:
            bias = self._workspace("packed gate and up bias", 2 * rows)
            gate_up = Projection(gate_up.weight, bias)
            sources |= {"gate bias": spec.gate.bias_or_zeros, "up bias": spec.up.bias_or_zeros}
            buffers |= {"gate bias": bias[:rows], "up bias": bias[rows:]}
        index = pack.parts.to(spec.gate.weight.device)
        for name, source in sources.items():
            torch.index_select(source, 0, index, out=buffers[name][:total])
        part = {name: buffer[:total] for name, buffer in buffers.items()}
        gate, up = (Projection(part[name], part.get(f"{name} bias")) for name in ("gate", "up"))
        output = Projection(buffers["output"][:total].t(), spec.output.bias)
        block = replace(spec.block, num_channels=total)
        return PackedMLP(
            block=block, norm=spec.norm, gate=gate, up=up, output=output,
            activation=spec.activation, activation_name=spec.activation_name,
            candidates=pack.candidates, buffers=buffers, gate_up=gate_up,
        )  # fmt: skip

    def _attention(self, spec: Attention, pack: Pack) -> Attention:
        width, heads = spec.block.head_dim, pack.parts
        kv_of_kept = torch.tensor(spec.block.kv_of_head)[heads]
        kv_heads, kv_of_head = kv_of_kept.unique(return_inverse=True)
        columns = output_columns(spec, self._workspace)
        output = take_blocks("packed attention output", columns, heads, width, self._workspace).t()
        return replace(
            spec,
            block=replace(spec.block, kv_of_head=tuple(kv_of_head.tolist())),
            query=take_projection("packed query", spec.query, heads, width, self._workspace),
            key=take_projection("packed key", spec.key, kv_heads, width, self._workspace),
            value=take_projection("packed value", spec.value, kv_heads, width, self._workspace),
            output=Projection(
                output.contiguous() if self._contiguous else output, spec.output.bias
            ),
        )


def packs_of(
    tree: MaskTree, structure: Structure, route: Route, *, tokens: int, waves: int
) -> dict[int, Pack]:
    """Which sub-layers are worth packing in a call, and how; see `policy.packing_pays`.

    Args:
        tree: of the call's sub-models.
        structure: the model.
        route: what the user wants.
        tokens: of all sequences.
        waves: how many there are.
    """
    packs = {}
    for depth, block in enumerate(structure.blocks):
        if block is None or route not in PACKING:
            continue
        groups = [
            tree.kept(depth, [mask for mask, _ in node.children]).any(dim=0)
            for node in tree.nodes(depth, 0, tree.num_leaves)
        ]
        kept = torch.stack(groups)
        used, common = kept.any(dim=0), tree.kept_by_all(depth)
        sizes = kept.sum(dim=1).tolist()
        shares = [size / kept.shape[1] for size in sizes]
        is_attention = isinstance(block, AttentionBlock)
        fixed = 0 if is_attention else int(common.sum())
        used_share, fixed_share = int(used.sum()) / kept.shape[1], fixed / kept.shape[1]
        if not packing_pays(route, shares, used_share, fixed_share, tokens, waves):
            continue
        if is_attention:
            packs[depth] = Pack(used.nonzero().flatten(), 0)
        else:
            multiple = FIXED_MULTIPLE if route == "split" else 1
            packs[depth] = Pack.of_channels(used, common, multiple)
    return packs
