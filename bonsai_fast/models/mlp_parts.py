"""Channels of an MLP sub-layer and the weights of each."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.models.blocks import Cut
from bonsai_fast.models.find_sublayers import LayerTracer, SubLayerFound
from bonsai_fast.models.parts import (
    SHARED,
    UNREAD,
    MixedPartsError,
    Names,
    matrix_cuts,
    parameter_cut,
)
from bonsai_fast.models.readers import MANY, NOBODY, Bits, reader_bits

# A channel behind a ReLU is silent for half of all random tokens.
MAX_RUNS = 8


def find_channels(tracer: LayerTracer, sublayer: SubLayerFound, names: Names) -> tuple[Cut, ...]:
    """Find what belongs to each channel.

    Raises:
        MixedPartsError: channels cannot be removed one by one; the message says why.
    """
    matrix = tracer.matrices[sublayer.output]
    columns = matrix.in_features
    at_layer = sublayer.module == tracer.run.path
    others = [] if at_layer else [n for n in tracer.tensors if n.startswith(f"{sublayer.module}.")]
    projections = list(sublayer.matrices[:-1])
    readers = _readers(tracer, sublayer.output, projections, others, columns)
    cuts: list[Cut] = []
    for path in projections:
        owner = _owner(readers[path], columns)
        if bool((owner == SHARED).any()):
            raise MixedPartsError(_reason(tracer, sublayer, path))
        cuts += matrix_cuts(names, path, owner, transposed=tracer.matrices[path].transposed)
    for name in others:
        cut = parameter_cut(names, name, _owner(readers[name], columns), columns)
        cuts += [cut] if cut is not None else []
    dim = 0 if matrix.transposed else 1
    return (
        *cuts,
        Cut(names.full(f"{sublayer.output}.weight"), dim, torch.arange(columns)),
    )


def _readers(
    tracer: LayerTracer, output: str, projections: list[str], others: list[str], columns: int
) -> dict[str, Bits]:
    found: dict[str, Bits] = {}
    for _ in range(MAX_RUNS):
        traced = tracer.trace(alone=True)
        outputs = traced.calls[output][0].reshape(-1, columns)
        sources = [traced.calls[path][1] for path in projections]
        sources += [tracer.tensors[name] for name in others]
        for name, bits in zip([*projections, *others], reader_bits(outputs, sources), strict=True):
            if name in projections:  # [..., rows] -> [rows]
                bits = Bits(*(_union(part) for part in bits))
            found[name] = found[name] | bits if name in found else bits
        if all(bool((found[path].only_reader(columns) != NOBODY).all()) for path in projections):
            break
    return found


def _union(bits: Tensor) -> Tensor:
    rows = bits.reshape(-1, bits.shape[-1])
    found = rows[0].clone()
    for row in rows[1:]:
        found |= row
    return found


def _owner(bits: Bits, columns: int) -> Tensor:
    reader = bits.only_reader(columns)
    owner = torch.where(reader == MANY, SHARED, reader)
    return torch.where(reader == NOBODY, UNREAD, owner)


def _reason(tracer: LayerTracer, sublayer: SubLayerFound, path: str) -> str:
    """Why the rows of a projection belong to many channels."""
    columns = tracer.matrices[sublayer.output].in_features
    inside = f"{sublayer.module}."
    for other, (given, result) in tracer.trace(alone=True).passed.items():
        is_norm = any(name.startswith(f"{other}.") for name in tracer.tensors)
        is_wide = given.shape == result.shape and given.shape[-1] == columns
        if other.startswith(inside) and is_norm and is_wide:
            kind = type(tracer.run.layer.get_submodule(other[len(tracer.run.path) + 1 :]))
            name = other.rpartition(".")[2]
            return f"{kind.__name__} ({name}) normalises all channels together"
    return f"{path.rpartition('.')[2]} mixes channels"
