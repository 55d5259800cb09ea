"""Q4_K_M files, quantised by llama.cpp's own function.

The prebuilt library exports the function that quantises rows, but not the program that chooses the
type of each tensor. This file repeats its rules for Q4_K_M and the tensors of LLaMA.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import gguf
import numpy
import xllamacpp
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

# Used instead where rows are no multiple of the type's blocks of 256.
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}


def quantize_q4_k_m(source: Path, target: Path) -> None:
    """Quantise a GGUF file in F32 or F16."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    num_layers = reader.get_field(f"{architecture}.block_count").contents()
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            is_array = field.types[0] == GGUFValueType.ARRAY
            sub_type = field.types[-1] if is_array else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    for tensor in reader.tensors:
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = _type_of(tensor.name, rows, num_layers, tied)
        data = rows if kind == Type.F32 else _quantized(rows, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=None if kind == Type.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type_of(name: str, rows: numpy.ndarray, num_layers: int, tied: bool) -> Type:
    if rows.ndim < 2:
        return Type.F32
    kind = Type.Q4_K
    layer = re.match(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", name)
    is_head = name == ("token_embd.weight" if tied else "output.weight")
    if is_head or (layer is not None and _gets_more_bits(int(layer[1]), num_layers)):
        kind = Type.Q6_K
    if rows.shape[-1] % 256:
        kind = FALLBACK[kind]
    return Type.F16 if rows.shape[-1] % 32 else kind


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _quantized(rows: numpy.ndarray, kind: Type) -> numpy.ndarray:
    if kind == Type.F16:
        return rows.astype(numpy.float16)
    library = ctypes.CDLL(str(Path(xllamacpp.xllamacpp.__file__)))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    values = numpy.ascontiguousarray(rows, dtype=numpy.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed = numpy.empty((len(values), values.shape[1] // block * size), dtype=numpy.uint8)
    written = library.ggml_quantize_chunk(
        ctypes.c_int(int(kind)),
        values.ctypes.data_as(ctypes.c_void_p),
        packed.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(values.shape[0]),
        ctypes.c_int64(values.shape[1]),
        None,
    )
    assert written == packed.nbytes, (kind, written, packed.nbytes)
    return packed
