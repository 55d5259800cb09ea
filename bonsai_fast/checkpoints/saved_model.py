"""A saved model, read without loading it: configuration, layer shapes, single tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from bonsai_fast.hub import LayerShape, pruned_config, register
from bonsai_fast.models import family_of

REPORT_NAME = "bonsai_report.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class SavedModel:
    """A directory that `save_pretrained` or transformers wrote; no weights are in memory.

    Attributes:
        directory: of the model.
        config: its configuration.
        files: the file of every tensor, by the tensor's name.
    """

    directory: Path
    config: PreTrainedConfig
    files: Mapping[str, Path]

    @property
    def family(self) -> str:
        """The parent's model type: "llama" for a bonsai_llama."""
        return family_of(self.config.model_type)

    @property
    def is_stock(self) -> bool:
        """Whether it has the parent's own class, not a bonsai_* class."""
        return self.family == self.config.model_type

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        value = getattr(self.config, "head_dim", None)
        return int(value or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def is_tied(self) -> bool:
        """Whether embeddings and LM head are the same tensor."""
        return bool(self.config.tie_word_embeddings)

    @property
    def has_output_biases(self) -> bool:
        """Whether output projections have a bias, which is kept if their sub-layer is removed."""
        return any(name.endswith(("o_proj.bias", "down_proj.bias")) for name in self.files)

    @cached_property
    def shapes(self) -> tuple[LayerShape, ...]:
        """What every decoder layer keeps."""
        config: Any = self.config
        if (pruned := pruned_config(config)) is not None:
            found: list[LayerShape] = pruned.layer_shapes()
            return tuple(found)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        shape = LayerShape((heads // kv_heads,) * kv_heads, config.intermediate_size)
        return (shape,) * int(config.num_hidden_layers)

    @cached_property
    def report(self) -> dict[str, Any]:
        """Content of `bonsai_report.json`; empty if there is none."""
        path = self.directory / REPORT_NAME
        if not path.is_file():
            return {}
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ValueError: there is no tensor of this name.
        """
        if name not in self.files:
            raise ValueError(f"{self.directory} holds no tensor {name}")
        with safe_open(self.files[name], "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found


def open_saved(path: str | os.PathLike[str]) -> SavedModel:
    """Open a model directory, or the model of a run directory.

    Raises:
        ValueError: `path` is neither, the model type is unknown, or there are no safetensors.
    """
    directory = model_directory(path)
    register()
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory} cannot be read: {error}") from error
    return SavedModel(directory, config, _files(directory))


def model_directory(path: str | os.PathLike[str]) -> Path:
    """The folder with config.json: the given one, or its folder 'model'.

    Raises:
        ValueError: neither folder has one.
    """
    given = Path(path)
    for directory in (given, given / "model"):
        if (directory / "config.json").is_file():
            return directory
    is_run = any((given / name).is_file() for name in ("run.json", "recover.json"))
    what = "an unfinished run" if is_run else "no saved model"
    raise ValueError(f"expected a run or a model directory, got {given}, which holds {what}")


def _files(directory: Path) -> dict[str, Path]:
    index = directory / INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in weight_map.items()}
    weights = directory / WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{directory} holds no {WEIGHTS_NAME}")
    try:
        with safe_open(weights, "pt") as file:
            return dict.fromkeys(file.keys(), weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not readable as safetensors: {error}") from error
