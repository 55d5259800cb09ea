"""A model whose sub-layers are packed when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.operands.copies import output_columns, take_heads
from bonsai_fast.scoring.fused.operands.packed import Pack, PackedMLP, packed_channels
from bonsai_fast.scoring.fused.parent import MLP, Attention, Projection, Removed, SubLayer


class PackedSublayers(Sequence[SubLayer]):
    """Sub-layers, of which some are packed; one is valid until the next one is read.

    Args:
        whole: the sub-layers.
        packs: what is packed, by depth; the other sub-layers are not changed.
        arithmetic: has the buffers for the copies.
    """

    def __init__(
        self, whole: Sequence[SubLayer], packs: Mapping[int, Pack], arithmetic: Arithmetic
    ) -> None:
        self._whole, self._packs, self._arithmetic = whole, packs, arithmetic

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, depth):  # type: ignore[no-untyped-def]
        spec, pack = self._whole[depth], self._packs.get(depth)
        if pack is None or isinstance(spec, Removed):
            return spec
        if len(pack.parts) == 0:
            return Removed(spec.output.bias, spec.post_norm, spec.residual_factor)
        return self._mlp(spec, pack) if isinstance(spec, MLP) else self._attention(spec, pack)

    def _mlp(self, spec: MLP, pack: Pack) -> PackedMLP:
        total, width = len(pack.parts), len(spec.output.weight)
        rows = total + pack.candidates
        count = len(spec.inputs)
        weight = self._arithmetic.buffer("packed gate and up", count * rows, width)
        gate_up = Projection(weight, None)
        sources = {name: part.weight for name, part in spec.inputs.items()}
        buffers = dict(zip(sources, weight.split(rows), strict=True))
        if any(part.bias is not None for part in spec.inputs.values()):
            bias = self._arithmetic.buffer("packed gate and up bias", count * rows)
            gate_up = Projection(weight, bias)
            biases = {f"{name} bias": part.bias_or_zeros for name, part in spec.inputs.items()}
            sources |= biases
            buffers |= dict(zip(biases, bias.split(rows), strict=True))
        sources["output"] = output_columns(spec, self._arithmetic)
        buffers["output"] = self._arithmetic.buffer("packed output", rows, width)
        index = pack.parts.to(spec.up.weight.device)
        for name, source in sources.items():
            torch.index_select(source, 0, index, out=buffers[name][:total])
        inputs, output_rows = packed_channels(buffers, 0, total)
        return PackedMLP(
            block=replace(spec.block, num_channels=total),
            norm=spec.norm,
            post_norm=spec.post_norm,
            residual_factor=spec.residual_factor,
            gate=inputs[0] if count > 1 else None,
            up=inputs[-1],
            output=Projection(output_rows.t(), spec.output.bias),
            activation=spec.activation,
            activation_name=spec.activation_name,
            candidates=pack.candidates,
            buffers=buffers,
            gate_up=gate_up,
        )

    def _attention(self, spec: Attention, pack: Pack) -> Attention:
        columns = output_columns(spec, self._arithmetic)
        heads = take_heads("packed", spec, pack.parts, columns, self._arithmetic)
        output = heads.output_rows.t()
        if self._arithmetic.kernels:
            # the kernels read [D, columns]
            output = output.contiguous()
        return replace(
            spec,
            block=replace(spec.block, kv_of_head=heads.kv_of_head),
            kv_of_head=heads.kv_of_head,
            query=heads.query,
            key=heads.key,
            value=heads.value,
            output=Projection(output, spec.output.bias),
        )
