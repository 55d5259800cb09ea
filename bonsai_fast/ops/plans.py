"""Index tables for kernels: which rows belong to which sub-model, and which units it keeps.

A wave holds the rows of K sub-models, one after another: sub-model k's rows are contiguous, in the
order of k. Tables are made on the CPU, where the masks are drawn, and copied once per wave: no
kernel launch waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.kernels._sizes import BLOCK_ROWS, INDEX_PADDING
from bonsai_fast.ops.native import kept_lists


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Rows grouped by sub-model.

    Attributes:
        sizes: rows of each sub-model, K numbers >= 0.
        row_group: int32 [T], the sub-model of each row.
        tiles: int32 [num_tiles, 3]: sub-model, first row, one past the last row. A tile holds at
            most BLOCK_ROWS rows and never those of two sub-models.
    """

    sizes: tuple[int, ...]
    row_group: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], *, device: torch.device | str = "cpu") -> RowPlan:
        """The plan of K sub-models with these numbers of rows.

        Raises:
            ValueError: a size is negative, or their sum does not fit int32.
        """
        if any(size < 0 for size in sizes):
            raise ValueError(f"sizes must not be negative, got {min(sizes)}")
        if sum(sizes) > torch.iinfo(torch.int32).max:
            raise ValueError(f"sizes must sum to less than 2^31 rows, got {sum(sizes)}")
        lengths = torch.tensor(sizes, dtype=torch.int64)
        groups = torch.arange(len(sizes))
        owner, first, end = _tile(lengths)
        return cls(
            tuple(int(size) for size in sizes),
            groups.repeat_interleave(lengths).to(device, torch.int32),
            torch.stack([owner, first, end], dim=1).to(device, torch.int32),
        )

    @property
    def num_rows(self) -> int:
        """T."""
        return sum(self.sizes)


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """Sequences of a wave, for attention: tokens see only their own sequence.

    Attributes:
        tiles: int32 [num_tiles, 4]: sub-model, first query row, and the sequence's first row and
            one past its last row. A tile's queries are the next BLOCK_ROWS rows of the sequence.
    """

    tiles: Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        groups: Sequence[int],
        *,
        device: torch.device | str = "cpu",
    ) -> SequencePlan:
        """The plan of sequences whose rows follow one another.

        Args:
            lengths: tokens of each sequence, in the order of rows.
            groups: the sub-model of each sequence.
        Raises:
            ValueError: the numbers of lengths and groups differ, or a length is negative.
        """
        if len(lengths) != len(groups):
            raise ValueError(f"expected {len(lengths)} groups, one per sequence, got {len(groups)}")
        if any(length < 0 for length in lengths):
            raise ValueError(f"lengths must not be negative, got {min(lengths)}")
        sizes = torch.tensor(lengths, dtype=torch.int64)
        owner, first, _ = _tile(sizes)
        ends = sizes.cumsum(0)
        columns = [torch.tensor(groups, dtype=torch.int64)[owner], first]
        columns += [(ends - sizes)[owner], ends[owner]]
        # Late queries have the most keys and start first: no long tile runs last and alone.
        order = torch.argsort(first - columns[2], descending=True, stable=True)
        return cls(torch.stack(columns, dim=1)[order].to(device, torch.int32))


@dataclass(frozen=True, eq=False)
class KeptLists:
    """The channels or heads of one layer that each sub-model keeps, as sorted lists.

    Attributes:
        index: int32 [K, width + INDEX_PADDING]; after a list's end its last entry repeats (0 in an
            empty list): kernels may read ahead and never read a removed unit.
        count: int32 [K], the number of kept units.
        width: slots of the compact tensors, at least the longest list.
    """

    index: Tensor
    count: Tensor
    width: int

    @classmethod
    def of(
        cls, keep: Tensor, *, multiple: int = 1, device: torch.device | str = "cpu"
    ) -> KeptLists:
        """The lists of a keep mask.

        Args:
            keep: bool [K, N] on the CPU, True = kept.
            multiple: `width` is rounded up to a multiple of it; channels need 128.
        Raises:
            ValueError: `keep` is not bool [K, N] on the CPU.
        """
        if keep.dtype != torch.bool or keep.dim() != 2:
            raise ValueError(f"keep must be bool [K, N], got {keep.dtype} {list(keep.shape)}")
        if keep.device.type != "cpu":
            raise ValueError(f"keep must be on the CPU, where its width is read, not {keep.device}")
        lists, count = kept_lists(keep, multiple=multiple)
        width = lists.shape[1]
        index = F.pad(lists, (0, INDEX_PADDING))
        if width:
            last = lists.gather(1, (count.long() - 1).clamp(min=0)[:, None])
            beyond = torch.arange(index.shape[1], dtype=torch.int32) >= count[:, None]
            index = torch.where(beyond, last, index)
        return cls(index, count, width).to(device)

    def to(self, device: torch.device | str) -> KeptLists:
        """The same on another device."""
        return KeptLists(self.index.to(device), self.count.to(device), self.width)


@dataclass(frozen=True, eq=False)
class HeadLists:
    """The query heads that each sub-model keeps, and the KV heads that those read.

    Attributes:
        query, kv: lists of both; a KV head is kept as long as one of its query heads is.
        q_to_kv: int32 [K, query.width], the slot in `kv` of each slot in `query`.
    """

    query: KeptLists
    kv: KeptLists
    q_to_kv: Tensor

    @classmethod
    def of(
        cls, keep: Tensor, *, num_kv_heads: int, device: torch.device | str = "cpu"
    ) -> HeadLists:
        """The lists of a keep mask of query heads.

        Args:
            keep: bool [K, Hq] on the CPU, True = kept.
            num_kv_heads: KV heads of the model; each is read by the same number of neighbouring
                query heads.
        Raises:
            ValueError: `keep` is not bool [K, Hq] on the CPU, or `num_kv_heads` does not divide Hq.
        """
        num_heads = keep.shape[-1]
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide {num_heads}, got {num_kv_heads}")
        share = num_heads // num_kv_heads
        return cls.reading(keep, [head // share for head in range(num_heads)], device=device)

    @classmethod
    def reading(
        cls, keep: Tensor, kv_of_head: Sequence[int], *, device: torch.device | str = "cpu"
    ) -> HeadLists:
        """The same for any map from query to KV heads, as in models that were pruned before.

        Args:
            keep: bool [K, Hq] on the CPU, True = kept.
            kv_of_head: the KV head that each query head reads, Hq numbers.
        Raises:
            ValueError: `keep` is not bool [K, Hq] on the CPU.
        """
        query = KeptLists.of(keep)
        if len(kv_of_head) != keep.shape[1]:
            raise ValueError(
                f"expected {keep.shape[1]} KV heads, one per query head, got {len(kv_of_head)}"
            )
        owner = torch.tensor(kv_of_head, dtype=torch.int64)
        readers = torch.zeros(len(keep), max(kv_of_head, default=0) + 1, dtype=torch.int64)
        needed = readers.index_add_(1, owner, keep.long()) > 0
        slot_of_kv = (needed.cumsum(dim=1) - 1).clamp(min=0)
        kv_of_slot = owner[query.index[:, : query.width].long()]
        return cls(
            query.to(device),
            KeptLists.of(needed, device=device),
            slot_of_kv.gather(1, kv_of_slot).to(device, torch.int32),
        )


def _tile(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut runs of rows into tiles: each tile's run, first row and one past its last row."""
    ends = lengths.cumsum(0)
    num_tiles = (lengths + BLOCK_ROWS - 1) // BLOCK_ROWS
    owner = torch.arange(len(lengths)).repeat_interleave(num_tiles)
    tile = torch.arange(len(owner)) - (num_tiles.cumsum(0) - num_tiles)[owner]
    first = (ends - lengths)[owner] + tile * BLOCK_ROWS
    return owner, first, torch.minimum(first + BLOCK_ROWS, ends[owner])
