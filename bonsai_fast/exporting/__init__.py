"""A saved model in the formats of other engines, and the proof that they run it."""

from bonsai_fast.exporting.agreement import Agreement, CheckError, reference_of
from bonsai_fast.exporting.check import TOLERANCE, check_llama_cpp, check_transformers, check_vllm
from bonsai_fast.exporting.decilm import to_decilm
from bonsai_fast.exporting.gguf_dense import DenseGGUF, KeptLayer
from bonsai_fast.exporting.gguf_export import to_gguf
from bonsai_fast.exporting.gguf_slice import slice_gguf, to_gguf_from_parent
from bonsai_fast.exporting.padded import pad_to_stock, to_padded
from bonsai_fast.exporting.result import Exported

__all__ = [
    "TOLERANCE",
    "Agreement",
    "CheckError",
    "DenseGGUF",
    "Exported",
    "KeptLayer",
    "check_llama_cpp",
    "check_transformers",
    "check_vllm",
    "pad_to_stock",
    "reference_of",
    "slice_gguf",
    "to_decilm",
    "to_gguf",
    "to_gguf_from_parent",
    "to_padded",
]
