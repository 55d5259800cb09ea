"""Sub-layers by kernels that read kept weights in place, for rows grouped by mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bonsai_fast import ops
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.operands.copies import output_columns
from bonsai_fast.scoring.fused.operands.packed import PackedMLP
from bonsai_fast.scoring.fused.parent import MLP, Attention, Norm, Projection
from bonsai_fast.scoring.fused.positions import Positions

# lists of kept channels are padded to a multiple of this length
CHANNEL_MULTIPLE = 128
# head_dim must be a multiple of the first and at most the second
HEAD_MULTIPLE, MAX_HEAD_DIM = 16, 256


def gathers(spec: Attention | MLP) -> bool:
    """Whether the kernels can compute a sub-layer."""
    if isinstance(spec, MLP):
        return spec.activation_name is not None
    norms = [norm for norm in (spec.query_norm, spec.key_norm) if norm is not None]
    return (
        gathers_heads(spec.head_dim)
        and not spec.norms_last
        and not (spec.rotary is not None and spec.rotary.interleaved)
        and all(not norm.centred and norm.weight is not None for norm in norms)
    )


def gathers_heads(head_dim: int) -> bool:
    """Whether the kernels can compute heads of this width."""
    return head_dim % HEAD_MULTIPLE == 0 and head_dim <= MAX_HEAD_DIM


@dataclass(frozen=True, eq=False)
class GatherOperands:
    """What each group of rows keeps, and the weights that the kernels read.

    Attributes:
        spec: the whole sub-layer.
        bank: its weights in the kernels' layout.
        rows_of_mask: number of rows of each mask, in the rows' order; None: one mask for all rows.
        query, kv, q_to_kv: lists of heads (see `HeadLists`); for an MLP, `query` lists channels and
            the others are None.
    """

    spec: Attention | MLP
    bank: Bank
    rows_of_mask: tuple[int, ...] | None
    query: ops.KeptLists
    kv: ops.KeptLists | None
    q_to_kv: Tensor | None
    _tiles_of_shape: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)

    @property
    def columns(self) -> int:
        """Width of the output projection's input, in which only listed parts have a place."""
        return self.query.width * self.spec.block.part_width

    def inner(self, normed: Tensor, positions: Positions) -> Tensor:
        """From the norm's output [R, T, D] to the output projection's input [R, T, columns]."""
        rows, length, width = normed.shape
        tokens = normed.view(-1, width)
        if isinstance(self.spec, MLP):
            found = self._channels(self.spec, tokens, self._tiles(rows, length))
        else:
            found = self._heads(self.spec, tokens, rows, positions)
        return found.view(rows, length, self.columns)

    def project_out(self, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        """The output projection with its bias, plus `residual` if given.

        Args:
            inputs: [R, T, columns].
            residual: [R, T, D].
        Returns:
            A new tensor [R, T, D].
        """
        rows, length, _ = inputs.shape
        tokens, output = inputs.flatten(0, 1), self.spec.output
        tables = (self.query.index, self.query.count, self._tiles(rows, length))
        added = (output.bias, None if residual is None else residual.flatten(0, 1))
        if isinstance(self.spec, MLP):
            assert self.bank.output_rows is not None
            change: Tensor = ops.kept_down_proj(tokens, self.bank.output_rows, *tables, *added)
        else:
            heads = tokens.unflatten(1, (self.query.width, -1))
            change = ops.kept_o_proj(heads, output.weight, *tables, *added)
        return change.view(rows, length, -1)

    def _channels(self, spec: MLP, tokens: Tensor, tiles: Tensor) -> Tensor:
        gate_up = self.bank.gate_up
        assert gate_up is not None and spec.activation_name is not None
        found: Tensor = ops.kept_up_proj(
            *(tokens, gate_up.weight, self.query.index, self.query.count, tiles, gate_up.bias),
            activation=spec.activation_name,
            gated=spec.gate is not None,
        )
        return found

    def _heads(self, spec: Attention, tokens: Tensor, rows: int, positions: Positions) -> Tensor:
        length = positions.length
        assert self.kv is not None and self.q_to_kv is not None
        tiles = self._tiles(rows, length)
        angles: tuple[Tensor, ...] = ()
        if spec.rotary is not None:
            angles = (*positions.exact_angles(spec.rotary), positions.of_rows(rows))

        def project(
            part: Projection, lists: ops.KeptLists, norm: Norm | None, *angles: Tensor
        ) -> Tensor:
            found: Tensor = ops.kept_head_proj(
                *(tokens, part.weight, lists.index, lists.count, tiles, part.bias),
                None if norm is None else _factors(norm),
                *angles,
                head_dim=spec.head_dim,
                norm_eps=0.0 if norm is None else norm.eps,
            )
            return found

        query = project(spec.query, self.query, spec.query_norm, *angles)
        factors = positions.query_factors(spec.query_growth)
        if factors is not None:
            query.unflatten(0, (rows, length)).mul_(factors[:, None, None])
        found: Tensor = ops.grouped_attention(
            query,
            project(spec.key, self.kv, spec.key_norm, *angles),
            project(spec.value, self.kv, None),
            self.query.count,
            self.q_to_kv,
            self._sequences(rows, length),
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )
        return found

    def _groups(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.rows_of_mask is None else self.rows_of_mask

    def _tiles(self, rows: int, length: int) -> Tensor:
        if (rows, length) not in self._tiles_of_shape:
            sizes = [count * length for count in self._groups(rows)]
            plan = ops.RowPlan.of(sizes, device=self.query.index.device)
            self._tiles_of_shape[rows, length] = plan.tiles
        return self._tiles_of_shape[rows, length]

    def _sequences(self, rows: int, length: int) -> Tensor:
        groups = [n for n, count in enumerate(self._groups(rows)) for _ in range(count)]
        device = self.query.index.device
        return ops.SequencePlan.of([length] * rows, groups, device=device).tiles


class Bank:
    """The weights of one sub-layer in the kernels' layout.

    Heads are read from the model's own weights. For channels, the rows of gate must be followed by
    those of up, which some models have, and the columns of the output projection must be stored as
    rows; otherwise they are copied. A packed MLP has this layout.

    Args:
        spec: the sub-layer.
        arithmetic: has the buffers for the copies; the next sub-layer's bank overwrites them.
    """

    def __init__(self, spec: Attention | MLP, arithmetic: Arithmetic) -> None:
        self.spec = spec
        self.gate_up: Projection | None = None
        self.output_rows: Tensor | None = None
        if isinstance(spec, PackedMLP):
            self.gate_up, self.output_rows = spec.gate_up, spec.buffers["output"]
        elif isinstance(spec, MLP):
            self.gate_up = spec.up if spec.gate is None else _joined(spec.gate, spec.up, arithmetic)
            self.output_rows = output_columns(spec, arithmetic)

    def operands(self, keep: Tensor, rows_of_mask: Sequence[int] | None) -> GatherOperands:
        """Operands for rows grouped by mask.

        Args:
            keep: bool [K, parts] on the CPU; of fewer parts, the first ones.
            rows_of_mask: number of rows of each mask; None: there is one mask, for all rows.
        """
        rows = None if rows_of_mask is None else tuple(rows_of_mask)
        device = self.spec.output.weight.device
        if isinstance(self.spec, MLP):
            lists = ops.KeptLists.of(keep, multiple=CHANNEL_MULTIPLE, device=device)
            return GatherOperands(self.spec, self, rows, lists, None, None)
        heads = ops.HeadLists.reading(keep, self.spec.kv_of_head, device=device)
        return GatherOperands(self.spec, self, rows, heads.query, heads.kv, heads.q_to_kv)


def _joined(gate: Projection, up: Projection, arithmetic: Arithmetic) -> Projection:
    """Gate rows, then up rows, as one weight: a view where they are adjacent, else a copy."""
    bias = None
    if gate.bias is not None or up.bias is not None:
        bias = torch.cat([gate.bias_or_zeros, up.bias_or_zeros])
    (rows, width), weight = gate.weight.shape, gate.weight
    end = weight.data_ptr() + weight.numel() * weight.element_size()
    if weight.is_contiguous() and up.weight.is_contiguous() and up.weight.data_ptr() == end:
        storage, other = weight.untyped_storage(), up.weight.untyped_storage()
        if storage.data_ptr() == other.data_ptr():
            return Projection(weight.as_strided((2 * rows, width), (width, 1)), bias)
    joined = arithmetic.buffer("gate and up rows", 2 * rows, width)
    return Projection(torch.cat([gate.weight, up.weight], out=joined), bias)


def _factors(norm: Norm) -> Tensor:
    assert norm.weight is not None
    return (1.0 + norm.weight.float()).to(norm.weight.dtype) if norm.adds_one else norm.weight
