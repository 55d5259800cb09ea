"""Python that loads a saved model: for its card, and for the last line of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# transformers has no class for these, vLLM has
VLLM_TYPES = ("nemotron-nas",)


def loading_code(directory: Path, path: str = ".") -> str:
    """Code that loads a saved model without asking a question.

    Args:
        directory: where the model is now.
        path: what the code calls it; "." works inside the directory.
    """
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") in VLLM_TYPES:
        return f"from vllm import LLM\n\nmodel = LLM({path!r}, trust_remote_code=True)"
    has_tokenizer = (directory / "tokenizer_config.json").is_file()
    names = ["AutoModelForCausalLM", *(["AutoTokenizer"] if has_tokenizer else [])]
    lines = [f"from transformers import {', '.join(names)}", ""]
    trust = ""
    if needs_our_class(config):
        lines.insert(0, "import bonsai_fast  # so that transformers knows the model's class")
    elif "auto_map" in config:
        trust = ", trust_remote_code=True"
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({path!r}, dtype='auto'{trust})")
    if has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({path!r}{trust})")
    return "\n".join(lines)


def needs_our_class(config: dict[str, Any]) -> bool:
    """Whether a configuration is of a class that bonsai_fast brings: its layers differ."""
    return str(config.get("model_type")).startswith("bonsai_")
