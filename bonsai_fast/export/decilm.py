"""A pruned LLaMA in the layout of DeciLM (Nemotron-NAS), which vLLM runs without a plugin.

Each layer may lack its attention or its MLP, and has its own number of query heads per KV head and
its own MLP width. The number of query heads is the same in all layers, so only MLP channels, KV
heads and whole sub-layers may have been pruned.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bonsai_fast.checkpoints.saved_model import (
    INDEX_NAME,
    REPORT_NAME,
    WEIGHTS_NAME,
    SavedModel,
    open_saved,
)
from bonsai_fast.export.exported import Exported
from bonsai_fast.hub import LayerShape, configuration_decilm
from bonsai_fast.surgery.parent_card import CARD_NAME
from bonsai_fast.surgery.save import model_directory

FAMILIES = ("llama", "mistral")
MODEL_TYPE = "nemotron-nas"
# `ffn_mult` can only express multiples of this width
MULTIPLE = 256
# not copied from the model's directory
OWN_FILES = {"config.json", CARD_NAME, REPORT_NAME, WEIGHTS_NAME, INDEX_NAME}


def to_decilm(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> Exported:
    """Write a saved model as DeciLM.

    Args:
        model: a run or model directory.
        output: a directory, new or empty.
    Raises:
        ValueError: query heads were pruned, or the blocks are not LLaMA's without biases.
        FileExistsError: something is at `output`.
        OSError: it cannot be written; nothing is left behind.
    """
    saved = open_saved(model)
    blocks = block_configs(saved)
    parent = str(saved.directory)
    with model_directory(output, parent, report={"exported_from": parent}) as scratch:
        _write_weights(saved, blocks, scratch)
        _copy_the_rest(saved.directory, scratch)
        text = json.dumps(_config(saved, blocks), indent=2, sort_keys=True)
        (scratch / "config.json").write_text(text + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in Path(output).glob("*.safetensors"))
    return Exported(str(output), "decilm", MODEL_TYPE, size, _notes(blocks))


def block_configs(saved: SavedModel) -> list[dict[str, dict[str, Any]]]:
    """`block_configs` of a saved model.

    Raises:
        ValueError: DeciLM has no such layers; the message says why.
    """
    config: Any = saved.config
    if saved.family not in FAMILIES:
        raise ValueError(f"DeciLM's block is LLaMA's; expected {FAMILIES}, got {saved.family!r}")
    if any(name.endswith(".bias") for name in saved.files):
        raise ValueError("DeciLM has no biases, this model does")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError("DeciLM has no sliding window, this model does")
    heads = num_query_heads(saved.shapes)
    if heads is None:
        counts = [shape.num_heads for shape in saved.shapes]
        raise ValueError(
            f"DeciLM has the same number of query heads in every layer, this model has {counts}; "
            "use the model directory itself, which vLLM's Transformers backend runs"
        )
    blocks = []
    has_residual = False  # the first sub-layer that exists must be an attention
    for index, shape in enumerate(saved.shapes):
        if shape.is_irregular:
            raise ValueError(f"layer {index}: its KV heads serve different numbers of query heads")
        last = index == len(saved.shapes) - 1
        group = heads // shape.num_kv_heads if shape.num_heads else None
        if group is None and not has_residual and (shape.channels or last):
            group = heads  # a stub of zeros: all query heads on one KV head
        has_residual |= group is not None
        attention = {"no_op": group is None, "replace_with_linear": False}
        ffn = {"no_op": not shape.channels, "replace_with_linear": False}
        blocks.append(
            {
                "attention": attention | ({} if group is None else {"n_heads_in_group": group}),
                "ffn": ffn | _width(shape.channels, int(config.hidden_size)),
            }
        )
    return blocks


def num_query_heads(shapes: Sequence[LayerShape]) -> int | None:
    """Query heads of every attention; None if they differ, 1 if there is no attention."""
    counts = {shape.num_heads for shape in shapes if shape.num_heads}
    return None if len(counts) > 1 else next(iter(counts), 1)


def _width(channels: int, hidden_size: int) -> dict[str, Any]:
    """The width as `ffn_mult`, which all engines read, if possible; else as `intermediate_size`."""
    if not channels:
        return {}
    if channels % MULTIPLE:
        return {"intermediate_size": channels}
    return {"ffn_mult": 3 * channels / (2 * hidden_size)}


def _notes(blocks: list[dict[str, dict[str, Any]]]) -> tuple[str, ...]:
    if all("intermediate_size" not in block["ffn"] for block in blocks):
        return ()
    return (
        f"some widths are no multiples of {MULTIPLE}: vLLM runs them, TensorRT-LLM and SGLang "
        f"do not (prune with --round-to {MULTIPLE})",
    )


def _config(saved: SavedModel, blocks: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """config.json: the model's fields and `block_configs`."""
    text = (saved.directory / "config.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    for name in ("per_layer_config", "layer_types", "q_heads_per_kv", "sliding_window"):
        values.pop(name, None)
    heads = num_query_heads(saved.shapes)
    return values | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "model_type": MODEL_TYPE,
        "block_configs": blocks,
        "head_dim": saved.head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def _write_weights(
    saved: SavedModel, blocks: list[dict[str, dict[str, Any]]], folder: Path
) -> None:
    """Write the model's tensors, file by file, and those of a stub."""
    weight_map: dict[str, str] = {}
    extra = _stub(saved, blocks)
    for path in sorted(set(saved.files.values())):
        names = [name for name, file in saved.files.items() if file == path]
        tensors = {name: saved.tensor(name) for name in names} | extra
        extra = {}
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    if len(set(weight_map.values())) > 1:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _stub(saved: SavedModel, blocks: list[dict[str, dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """Zeros for an attention that the model lacks and the layout needs."""
    found: dict[str, torch.Tensor] = {}
    like = saved.tensor("model.norm.weight")
    query, width = (num_query_heads(saved.shapes) or 1) * saved.head_dim, len(like)
    for index, (shape, block) in enumerate(zip(saved.shapes, blocks, strict=True)):
        if shape.num_heads or block["attention"]["no_op"]:
            continue
        prefix = f"model.layers.{index}"
        found[f"{prefix}.input_layernorm.weight"] = torch.ones_like(like)
        sizes = {"q": (query, width), "k": (saved.head_dim, width), "v": (saved.head_dim, width)}
        for name, size in (sizes | {"o": (width, query)}).items():
            found[f"{prefix}.self_attn.{name}_proj.weight"] = like.new_zeros(size)
    return found


def _copy_the_rest(directory: Path, folder: Path) -> None:
    """Copy tokenizer, generation configuration and the Python file of the configuration."""
    shutil.copy(str(configuration_decilm.__file__), folder / "configuration_decilm.py")
    for path in directory.iterdir():
        ours = path.suffix in (".py", ".safetensors") or path.name in OWN_FILES
        if path.is_file() and not ours:
            shutil.copy(path, folder / path.name)
