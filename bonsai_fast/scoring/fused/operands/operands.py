"""The weights that a sub-layer is run with: the model's own, copies of what a mask keeps, or lists
of what many masks keep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.eight_bits import Weight
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.operands.copies import output_columns, take_blocks, take_projection
from bonsai_fast.scoring.fused.operands.gather import GatherOperands
from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection


@dataclass(frozen=True, eq=False)
class AttentionOperands:
    """Weights of the heads that are computed; valid, as what is made of them, while these exist.

    Attributes:
        spec: the whole sub-layer.
        query: rows of the heads that are computed; key, value: of those that they read.
        output_rows: [heads * head_dim, D], the output projection's columns as rows.
        kv_of_head: KV head, among those that are computed, that each head reads.
    """

    spec: Attention
    query: Projection
    key: Projection
    value: Projection
    output_rows: Tensor
    kv_of_head: tuple[int, ...]

    @cached_property
    def weights(self) -> tuple[Weight, Weight, Weight]:
        """Query, key and value as right sides of products."""
        query, key, value = self.query.weight, self.key.weight, self.value.weight
        return Weight(query.t()), Weight(key.t()), Weight(value.t())

    @cached_property
    def output(self) -> Weight:
        """The output projection, likewise."""
        return Weight(self.output_rows)

    @property
    def columns(self) -> int:
        """Of the output projection's input."""
        return len(self.output_rows)

    @property
    def q_heads_per_kv(self) -> int | None:
        """How many query heads share a KV head, if that is the same for all and in order."""
        kv_heads = max(self.kv_of_head) + 1
        count = len(self.kv_of_head) // kv_heads
        regular = tuple(kv for kv in range(kv_heads) for _ in range(count))
        return count if regular == self.kv_of_head else None


@dataclass(frozen=True, eq=False)
class MLPOperands:
    """Weights of the channels that are computed; valid, as those of heads, while these exist.

    Attributes:
        spec: the whole sub-layer.
        gate, up: their rows.
        output_rows: [channels, D], the output projection's columns as rows.
    """

    spec: MLP
    gate: Projection
    up: Projection
    output_rows: Tensor

    @cached_property
    def weights(self) -> tuple[Weight, Weight]:
        """Gate and up as right sides of products."""
        return Weight(self.gate.weight.t()), Weight(self.up.weight.t())

    @cached_property
    def output(self) -> Weight:
        """The output projection, likewise."""
        return Weight(self.output_rows)

    @property
    def columns(self) -> int:
        """Of the output projection's input."""
        return len(self.output_rows)


Operands = AttentionOperands | MLPOperands | GatherOperands


def dense(spec: Attention | MLP) -> AttentionOperands | MLPOperands:
    """The model's own weights."""
    rows = spec.output.weight.t()
    if isinstance(spec, MLP):
        return MLPOperands(spec, spec.gate, spec.up, rows)
    return AttentionOperands(spec, spec.query, spec.key, spec.value, rows, spec.block.kv_of_head)


class Slicer:
    """Copies what a mask keeps of one sub-layer into a workspace, one mask at a time.

    Args:
        spec: the sub-layer.
        workspace: holds the copies; what was sliced before is overwritten.
    """

    def __init__(self, spec: Attention | MLP, workspace: Workspace) -> None:
        self.spec = spec
        self._workspace = workspace
        self._columns = output_columns(spec, workspace)

    def __call__(self, keep: Tensor) -> AttentionOperands | MLPOperands:
        """Weights of the kept parts.

        Args:
            keep: bool [heads] or [channels] on the CPU, not all False.
        """
        spec, kept = self.spec, keep.nonzero().flatten()
        if isinstance(spec, MLP):
            gate = take_projection("kept gate", spec.gate, kept, 1, self._workspace)
            up = take_projection("kept up", spec.up, kept, 1, self._workspace)
            rows = take_blocks("kept output", self._columns, kept, 1, self._workspace)
            return MLPOperands(spec, gate, up, rows)
        width = spec.block.head_dim
        kv_of_kept = torch.tensor(spec.block.kv_of_head)[kept]
        kept_kv, kv_of_head = kv_of_kept.unique(return_inverse=True)
        return AttentionOperands(
            spec,
            take_projection("kept query", spec.query, kept, width, self._workspace),
            take_projection("kept key", spec.key, kept_kv, width, self._workspace),
            take_projection("kept value", spec.value, kept_kv, width, self._workspace),
            take_blocks("kept output", self._columns, kept, width, self._workspace),
            tuple(kv_of_head.tolist()),
        )
