"""Write a GGUF file, whole or not at all, with one tensor in memory at a time."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from bonsai_fast.config.choices import GGUFPrecision
from bonsai_fast.export.gguf.tensors import TensorSpec

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
HALF_MAX = 65504.0


@dataclass(frozen=True)
class Field:
    """One entry of the metadata.

    Attributes:
        sub_type: type of the elements of an array.
    """

    value: Any
    type: GGUFValueType
    sub_type: GGUFValueType | None = None


Fields = dict[str, Field]


def text(value: str) -> Field:
    """A string."""
    return Field(value, GGUFValueType.STRING)


def number(value: int) -> Field:
    """An unsigned integer."""
    return Field(int(value), GGUFValueType.UINT32)


def real(value: float) -> Field:
    """A float32."""
    return Field(float(value), GGUFValueType.FLOAT32)


def flag(value: bool) -> Field:
    """A bool."""
    return Field(bool(value), GGUFValueType.BOOL)


def array(values: Sequence[Any], sub_type: GGUFValueType) -> Field:
    """An array with at least one element."""
    return Field(list(values), GGUFValueType.ARRAY, sub_type)


def widths(values: Sequence[int]) -> Field:
    """A number for every layer; a single integer if all are equal."""
    if len(set(values)) == 1:
        return number(values[0])
    return array([int(value) for value in values], GGUFValueType.INT32)


def write_gguf(
    path: Path,
    architecture: str,
    fields: Fields,
    tensors: Iterable[TensorSpec],
    precision: GGUFPrecision,
    advance: Callable[[], None] = lambda: None,
) -> int:
    """Write a file. Norms and biases are float32, as llama.cpp needs them.

    With q8_0, a matrix whose rows are no multiple of its block of 32 is stored as float16.

    Args:
        path: of the file; it must not exist.
        architecture: llama.cpp's name.
        fields: the metadata.
        tensors: in the order of the file.
        precision: of matrices.
        advance: called after each tensor.
    Returns:
        size of the file in bytes.
    Raises:
        FileExistsError: `path` exists.
        ValueError: a value is too large for float16.
        OSError: it cannot be written; no part of it is left.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another output")
    specs = list(tensors)
    types = [_type_of(spec, precision) for spec in specs]
    writer = gguf.GGUFWriter(None, architecture)
    for key, field in fields.items():
        writer.add_key_value(key, field.value, field.type, field.sub_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(TYPES[precision][1])
    for spec, kind in zip(specs, types, strict=True):
        shape = gguf.quant_shape_to_byte_shape(spec.shape, kind)
        size = int(numpy.prod(shape))
        writer.add_tensor_info(spec.name, shape, numpy.dtype(numpy.uint8), size, kind)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path.parent, sum(_bytes(spec, kind) for spec, kind in _pairs(specs, types)))
        writer.write_header_to_file(scratch)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for spec, kind in _pairs(specs, types):
            writer.write_tensor_data(_encoded(spec, kind))
            advance()
        writer.flush()
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        size = scratch.stat().st_size
        scratch.rename(path)
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        writer.close()
        with suppress(OSError):  # it may not exist
            scratch.unlink()
    return size


def _pairs(
    specs: list[TensorSpec], types: list[GGMLQuantizationType]
) -> Iterable[tuple[TensorSpec, GGMLQuantizationType]]:
    return zip(specs, types, strict=True)


def _type_of(spec: TensorSpec, precision: GGUFPrecision) -> GGMLQuantizationType:
    kind = TYPES[precision][0]
    if len(spec.shape) < 2:
        return GGMLQuantizationType.F32
    if spec.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16
    return kind


def _bytes(spec: TensorSpec, kind: GGMLQuantizationType) -> int:
    return int(numpy.prod(gguf.quant_shape_to_byte_shape(spec.shape, kind)))


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")


def _encoded(spec: TensorSpec, kind: GGMLQuantizationType) -> Any:
    """The bytes of a tensor."""
    tensor = spec.make()
    assert tensor.shape == spec.shape, f"{spec.name}: {tuple(tensor.shape)}, not {spec.shape}"
    if kind == GGMLQuantizationType.F16:
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if largest > HALF_MAX:
            raise ValueError(
                f"{spec.name} holds {largest:.4g}, too large for f16: use --precision bf16"
            )
        values = tensor.half().contiguous().numpy()
    elif kind == GGMLQuantizationType.BF16:
        values = tensor.bfloat16().contiguous().view(torch.int16).numpy()
    else:
        values = tensor.float().contiguous().numpy()
        if kind != GGMLQuantizationType.F32:
            values = gguf.quantize(values, kind)
    return values.reshape(-1).view(numpy.uint8)
