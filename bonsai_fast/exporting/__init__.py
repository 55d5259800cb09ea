"""A saved model in the formats of other engines, and the proof that they run it."""

from bonsai_fast.exporting.agreement import Agreement, CheckError, reference_of
from bonsai_fast.exporting.check import TOLERANCE, check_llama_cpp
from bonsai_fast.exporting.gguf_dense import DenseGGUF, KeptLayer
from bonsai_fast.exporting.gguf_export import Exported, to_gguf
from bonsai_fast.exporting.gguf_slice import slice_gguf, to_gguf_from_parent

__all__ = [
    "TOLERANCE",
    "Agreement",
    "CheckError",
    "DenseGGUF",
    "Exported",
    "KeptLayer",
    "check_llama_cpp",
    "reference_of",
    "slice_gguf",
    "to_gguf",
    "to_gguf_from_parent",
]
