"""Write a saved model in the formats of other engines, and check that they run it."""

from bonsai_fast.export.check import TOLERANCE, check_llama_cpp, check_transformers, check_vllm
from bonsai_fast.export.decilm import to_decilm
from bonsai_fast.export.exported import Exported
from bonsai_fast.export.gguf.dense_gguf import DenseGGUF, KeptLayer
from bonsai_fast.export.gguf.from_dense_gguf import slice_gguf, to_gguf_from_parent
from bonsai_fast.export.gguf.from_model import to_gguf
from bonsai_fast.export.padded import pad_to_stock, to_padded
from bonsai_fast.export.reference_answers import Agreement, CheckError, reference_of

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
