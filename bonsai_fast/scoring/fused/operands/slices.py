"""Slices: copies of what each of several masks keeps of a sub-layer, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.operands.operands import (
    AttentionOperands,
    MLPOperands,
    Operands,
    Slicer,
)
from bonsai_fast.scoring.fused.operands.packed import PackedMLP, packed_slices
from bonsai_fast.scoring.fused.operands.prefetch import (
    CUDASideStream,
    NoSideStream,
    SideStream,
    prefetched,
)
from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection

# slices of an MLP are padded with zeros to a multiple of this width, which suits a GPU
CHANNEL_MULTIPLE = 64
# 32-bit entries in 16 bytes
ALIGNED_ENTRIES = 4


def sliced(spec: Attention | MLP, keep: Tensor, arithmetic: Arithmetic) -> Iterator[Operands]:
    """Operands of one mask at a time; the next mask overwrites them.

    With kernels on a GPU, the next mask is copied while the current one is used.

    Args:
        spec: the sub-layer.
        keep: bool [N, parts] on the CPU, no row all False.
        arithmetic: has the buffers for the copies.
    """
    if len(keep) == 0:
        return
    if isinstance(spec, PackedMLP):
        for inputs, rows in packed_slices(spec, keep):
            yield MLPOperands(rows, spec, inputs)
        return
    if not arithmetic.kernels:
        yield from map(Slicer(spec, arithmetic), keep)
        return
    copies = CompactSlices(spec, keep, arithmetic)
    device = spec.output.weight.device
    stream: SideStream = CUDASideStream(device) if device.type == "cuda" else NoSideStream()
    jobs = [partial(copies.fill, number) for number in range(len(keep))]
    for number, place in enumerate(prefetched(jobs, stream)):
        yield copies.operands(number, place)


class CompactSlices:
    """Slices copied by `compact_rows` and `compact_columns`, in two places.

    Args:
        spec: the sub-layer.
        keep: bool [N, parts] on the CPU.
        arithmetic: has the buffers. Those of both places are allocated here, because `fill` runs on
            a side stream.
    """

    def __init__(self, spec: Attention | MLP, keep: Tensor, arithmetic: Arithmetic) -> None:
        self._spec, self._arithmetic = spec, arithmetic
        device = spec.output.weight.device
        self._kv_of_kept: list[tuple[int, ...]] = []
        if isinstance(spec, MLP):
            self._multiple = CHANNEL_MULTIPLE
            self._sources = spec.inputs
            index = _Index(ops.KeptLists.of(keep), 1, device)
            self._index = dict.fromkeys((*self._sources, "output"), index)
        else:
            width = spec.head_dim
            self._multiple = 1  # heads are not padded
            heads = ops.HeadLists.reading(keep, spec.kv_of_head)
            counts = heads.query.count.tolist()
            self._kv_of_kept = [
                tuple(slots[:count].tolist())
                for slots, count in zip(heads.q_to_kv, counts, strict=True)
            ]
            self._sources = {"query": spec.query, "key": spec.key, "value": spec.value}
            self._index = {"query": _Index(heads.query, width, device)}
            self._index["key"] = self._index["value"] = _Index(heads.kv, width, device)
            self._index["output"] = self._index["query"]
        for place in range(2):
            self._reserve(place)

    def fill(self, number: int, place: int) -> None:
        """Copy what mask `number` keeps to a place."""
        for name, projection in self._sources.items():
            index, copy = self._index[name].rows(number), self._projection(name, number, place)
            ops.compact_rows(projection.weight, index, copy.weight)
            if projection.bias is not None and copy.bias is not None:
                ops.compact_rows(projection.bias[:, None], index, copy.bias[:, None])
        columns = self._index["output"].rows(number)
        ops.compact_columns(self._spec.output.weight, columns, self._output(number, place))

    def operands(self, number: int, place: int) -> Operands:
        """The copies of mask `number`, which `fill` made at a place."""
        part = {name: self._projection(name, number, place) for name in self._sources}
        rows = self._output(number, place).t()
        if isinstance(self._spec, MLP):
            return MLPOperands(rows, self._spec, tuple(part.values()))
        kv_of_kept = self._kv_of_kept[number]
        return AttentionOperands(
            rows, self._spec, part["query"], part["key"], part["value"], kv_of_kept
        )

    def _reserve(self, place: int) -> None:
        for name, projection in self._sources.items():
            rows = self._padded(len(projection.weight))
            self._arithmetic.buffer(f"slice {name} {place}", rows, projection.weight.shape[1])
            if projection.bias is not None:
                self._arithmetic.buffer(f"slice {name} bias {place}", rows)
        rows, columns = self._spec.output.weight.shape
        self._arithmetic.buffer(f"slice output {place}", rows, self._padded(columns))

    def _padded(self, count: int) -> int:
        return -(-count // self._multiple) * self._multiple

    def _projection(self, name: str, number: int, place: int) -> Projection:
        source, rows = self._sources[name], self._padded(self._index[name].counts[number])
        weight = self._arithmetic.buffer(f"slice {name} {place}", rows, source.weight.shape[1])
        if source.bias is None:
            return Projection(weight, None)
        return Projection(weight, self._arithmetic.buffer(f"slice {name} bias {place}", rows))

    def _output(self, number: int, place: int) -> Tensor:
        columns = self._padded(self._index["output"].counts[number])
        return self._arithmetic.buffer(
            f"slice output {place}", len(self._spec.output.weight), columns
        )


class _Index:
    """The rows of each mask's kept parts: int32 lists, moved to the device together."""

    def __init__(self, lists: ops.KeptLists, width: int, device: torch.device) -> None:
        parts = lists.index[:, : lists.width]
        rows = parts[:, :, None] * width + torch.arange(width, dtype=torch.int32)
        rows = rows.flatten(1)
        # every list begins at a multiple of 16 bytes: the kernels are compiled for that
        self._rows = F.pad(rows, (0, -rows.shape[1] % ALIGNED_ENTRIES)).to(device)
        self.counts = [count * width for count in lists.count.tolist()]

    def rows(self, number: int) -> Tensor:
        return self._rows[number, : self.counts[number]]
