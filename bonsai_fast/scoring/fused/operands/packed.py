"""Packed sub-layers: copies of the parts that any sub-model of a call keeps.

In a round of pruning, most units are the same in all sub-models: some were removed before, most are
kept by all, and only a few candidates vary. A packed sub-layer copies what any sub-model keeps. The
copy of an MLP has its candidates first, then the fixed channels, which all sub-models keep, and
room at the end:

    [candidates | fixed | room]

Computed as it is, it is a parent that was pruned before. The slice of one mask begins at `fixed`;
its candidates are copied into the room after it, so few rows are copied instead of all. On route
"split", `fixed` is one product for all masks, and kernels gather the candidates; see `split`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection


@dataclass(frozen=True, eq=False)
class Pack:
    """The parts of a sub-layer that are packed.

    Attributes:
        parts: int64 [n], the parts that any sub-model keeps, candidates first.
        candidates: number of candidates; all sub-models keep the other parts.
    """

    parts: Tensor
    candidates: int

    @classmethod
    def of_channels(cls, used: Tensor, common: Tensor, multiple: int) -> Pack:
        """Pack the channels of an MLP.

        Args:
            used: bool [channels], kept by any sub-model.
            common: bool [channels], kept by all sub-models that keep any channel.
            multiple: if there are candidates, fixed channels are a multiple of this number; the
                remaining common channels become candidates.
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
        candidates: number of candidates, which are its first channels.
        buffers: "gate", "up" and "output" rows [n + candidates, D], and "gate bias" and "up bias",
            all with the room at their end. Without a gate there is nothing of it.
        gate_up: the gate rows and then the up rows of these buffers, [2 (n + candidates), D].
    """

    candidates: int
    buffers: Mapping[str, Tensor]
    gate_up: Projection


def packed_slices(spec: PackedMLP, keep: Tensor) -> Iterator[tuple[tuple[Projection, ...], Tensor]]:
    """Input projections and output rows of one mask at a time; the next mask overwrites them.

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
        yield packed_channels(spec.buffers, count, total + len(index))


def packed_channels(
    buffers: Mapping[str, Tensor], start: int, stop: int
) -> tuple[tuple[Projection, ...], Tensor]:
    """Input projections and output rows of the channels start..stop-1 of a packed MLP's buffers."""
    part = {name: buffer[start:stop] for name, buffer in buffers.items()}
    names = [name for name in ("gate", "up") if name in part]
    inputs = tuple(Projection(part[name], part.get(f"{name} bias")) for name in names)
    return inputs, part["output"]


def slice_order(spec: Attention | MLP, kept: Tensor) -> Tensor:
    """Kept parts in the order that they have in a slice: int64 [n].

    Args:
        spec: the sub-layer.
        kept: bool [parts].
    """
    index = kept.nonzero().flatten()
    if isinstance(spec, PackedMLP):
        is_candidate = index < spec.candidates
        index = torch.cat([index[~is_candidate], index[is_candidate]])
    return index
