"""Weights for the matrix products of a sub-layer: the model's own, or copies of some parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.eight_bits import Weight
from bonsai_fast.scoring.fused.operands.copies import (
    output_columns,
    take_blocks,
    take_heads,
    take_projection,
)
from bonsai_fast.scoring.fused.operands.gather import GatherOperands
from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection


@dataclass(frozen=True, eq=False)
class _OutputWeights:
    """The output projection of the parts that are computed.

    Attributes:
        output_rows: [columns, D], its columns as rows.
    """

    output_rows: Tensor

    @cached_property
    def output(self) -> Weight:
        """The right side of the output projection's product."""
        return Weight(self.output_rows)

    @property
    def columns(self) -> int:
        """Width of the output projection's input."""
        return len(self.output_rows)


@dataclass(frozen=True, eq=False)
class AttentionOperands(_OutputWeights):
    """Weights of the heads that are computed. Do not modify them while this object exists.

    Attributes:
        spec: the whole sub-layer.
        query, key, value: rows of the heads that are computed, and of the KV heads they read.
        kv_of_head: the KV head that each head reads, numbered among these KV heads.
    """

    spec: Attention
    query: Projection
    key: Projection
    value: Projection
    kv_of_head: tuple[int, ...]

    @cached_property
    def weights(self) -> tuple[Weight, Weight, Weight]:
        """The right sides of the query, key and value products."""
        query, key, value = self.query.weight, self.key.weight, self.value.weight
        return Weight(query.t()), Weight(key.t()), Weight(value.t())

    @property
    def is_regular(self) -> bool:
        """Whether every KV head is read by the same number of consecutive query heads."""
        kv_heads = max(self.kv_of_head) + 1
        count = len(self.kv_of_head) // kv_heads
        return self.kv_of_head == tuple(kv for kv in range(kv_heads) for _ in range(count))


@dataclass(frozen=True, eq=False)
class MLPOperands(_OutputWeights):
    """Weights of the channels that are computed. Do not modify them while this object exists.

    Attributes:
        spec: the whole sub-layer.
        inputs: rows of the channels that are computed; of gate, if there is one, and of up.
    """

    spec: MLP
    inputs: tuple[Projection, ...]

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The right sides of the products with `inputs`."""
        return tuple(Weight(part.weight.t()) for part in self.inputs)


Operands = AttentionOperands | MLPOperands | GatherOperands


def dense(spec: Attention | MLP) -> AttentionOperands | MLPOperands:
    """The model's own weights."""
    rows = spec.output.weight.t()
    if isinstance(spec, MLP):
        return MLPOperands(rows, spec, tuple(spec.inputs.values()))
    return AttentionOperands(rows, spec, spec.query, spec.key, spec.value, spec.kv_of_head)


class Slicer:
    """Copies what a mask keeps of a sub-layer, one mask at a time.

    Args:
        spec: the sub-layer.
        arithmetic: has the buffers for the copies; the next slice overwrites them.
    """

    def __init__(self, spec: Attention | MLP, arithmetic: Arithmetic) -> None:
        self.spec = spec
        self._arithmetic = arithmetic
        self._columns = output_columns(spec, arithmetic)

    def __call__(self, keep: Tensor) -> AttentionOperands | MLPOperands:
        """Copy the kept parts.

        Args:
            keep: bool [heads] or [channels] on the CPU, not all False.
        """
        spec, kept, arithmetic = self.spec, keep.nonzero().flatten(), self._arithmetic
        if isinstance(spec, MLP):
            inputs = tuple(
                take_projection(f"kept {name}", part, kept, 1, arithmetic)
                for name, part in spec.inputs.items()
            )
            rows = take_blocks("kept output", self._columns, kept, 1, arithmetic)
            return MLPOperands(rows, spec, inputs)
        heads = take_heads("kept", spec, kept, self._columns, arithmetic)
        return AttentionOperands(
            heads.output_rows, spec, heads.query, heads.key, heads.value, heads.kv_of_head
        )
