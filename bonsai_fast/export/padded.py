"""A pruned model as its parent's stock class: every layer padded with zeros to the widest one.

It loads wherever the parent's class does and computes the same as the pruned model. It is as large
and as slow as a model whose layers are all as wide as the widest one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError,
)

from bonsai_fast.checkpoints.saved_model import open_saved
from bonsai_fast.export.exported import Exported
from bonsai_fast.hub import LayerShape, pruned_config
from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import save_pretrained
from bonsai_fast.surgery.kept import kept_by
from bonsai_fast.surgery.save import check_target
from bonsai_fast.surgery.skeleton import stock_structure


def to_padded(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> Exported:
    """Write a saved model as a checkpoint of its parent's stock class.

    Args:
        model: a run or model directory.
        output: a directory, new or empty.
    Raises:
        ValueError: the model is of a stock class already, or that class cannot express it.
        FileExistsError: something is at `output`.
        OSError: it cannot be written; nothing is left behind.
    """
    saved = open_saved(model)
    if saved.is_stock:
        raise ValueError(f"{saved.directory} is a stock {saved.config.model_type} model already")
    check_target(Path(output), overwrite=False)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(saved.directory, dtype="auto")
    padded = pad_to_stock(loaded)
    has_tokenizer = (saved.directory / "tokenizer_config.json").is_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(saved.directory) if has_tokenizer else None
    report = {"padded_from": str(saved.directory)}
    save_pretrained(padded, output, tokenizer=tokenizer, report=report)
    size = sum(path.stat().st_size for path in Path(output).glob("*.safetensors"))
    note = f"all layers are as wide as the widest: {padded.num_parameters():,} parameters"
    note += f" instead of {loaded.num_parameters():,}"
    return Exported(str(output), "padded", str(padded.config.model_type), size, (note,))


@torch.no_grad()
def pad_to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """The same function in the parent's stock class: the inverse of `remove_units`.

    Args:
        model: a bonsai_* model.
    Raises:
        ValueError: the stock class has no place for biases that the model got, the model is a
            mixture of experts, or layers are too narrow whatever the stock configuration says.
    """
    shapes: list[LayerShape] = pruned_config(model.config).layer_shapes()
    if any((shape.experts, shape.expert_channels) != (None, None) for shape in shapes):
        raise ValueError(
            "a mixture of experts cannot be padded, since the router would choose the padding; "
            "prune with --uniform, and the result is a stock model"
        )
    try:
        child, shape = _narrowest(model, shapes)
    except AmbiguousGlobalPerLayerAttributeError as error:
        name = type(model).__name__
        raise ValueError(f"the layers of {name}'s parent are not alike, either") from error
    extra = sorted({name for name, _ in model.named_parameters()} - _parameter_names(child))
    if extra:
        raise ValueError(f"{type(child).__name__} has no place for {extra[0]}")
    layout = Layout.of(child)
    kept = kept_by(child, layout, _filled(layout, shapes, shape))
    copies: dict[int, nn.Parameter] = {}
    for name, empty in list(child.named_parameters(remove_duplicate=False)):
        if not kept.keeps(name):
            # the norm of a removed sub-layer: its output is multiplied by zeros
            fill = float(empty.dim() == 1 and name.endswith("weight"))
            _put(child, name, nn.Parameter(torch.full(empty.shape, fill, dtype=empty.dtype)))
            continue
        source = model.get_parameter(name)
        if id(source) not in copies:
            data = torch.zeros(empty.shape, dtype=source.dtype)
            dim, index = kept.slices.get(name, (0, torch.arange(empty.shape[0])))
            wanted = (*empty.shape[:dim], len(index), *empty.shape[dim + 1 :])
            if source.shape != wanted:
                raise ValueError(f"{type(child).__name__} has no room for {name}")
            copies[id(source)] = nn.Parameter(data.index_copy_(dim, index, source.data.cpu()))
        _put(child, name, copies[id(source)])
    for name, _ in list(child.named_buffers()):
        module, _, attribute = name.rpartition(".")
        buffer = model.get_submodule(module).get_buffer(attribute)
        setattr(child.get_submodule(module), attribute, buffer.clone())
    child.generation_config = model.generation_config
    child.eval()
    return child


def _parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, parameter)


def _narrowest(
    model: PreTrainedModel, shapes: list[LayerShape]
) -> tuple[PreTrainedModel, LayerShape]:
    """The smallest stock model that holds all shapes, on the meta device, and its layer shape."""
    config = pruned_config(model.config)
    for groups in _candidates(config, shapes):
        shape = LayerShape(groups, max(1, *(layer.channels or 1 for layer in shapes)))
        child = stock_structure(model, shape)
        if child is not None and _has_head_dim(child, config.head_dim):
            return child, shape
    raise ValueError(f"the stock class of {type(model).__name__} cannot hold its widest layer")


def _candidates(config: Any, shapes: list[LayerShape]) -> Iterator[tuple[int, ...]]:
    """Query heads per KV head, from the fewest needed to the parent's."""
    with config.as_dense():
        heads = int(getattr(config, "num_attention_heads", None) or 0)
        if not heads:
            raise ValueError(f"{type(config).__name__} has no number of heads")
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    needed_kv = max(1, *(shape.num_kv_heads or 1 for shape in shapes))
    needed = max(1, *(count for shape in shapes for count in shape.q_heads_per_kv or (1,)))
    if any(shape.alibi_heads is not None for shape in shapes):
        needed_kv = kv_heads  # ALiBi slopes depend on the number of a head
    sizes = {
        (kv, per_kv)
        for kv in range(needed_kv, kv_heads + 1)
        for per_kv in range(needed, heads // kv_heads + 1)
    }
    for kv, per_kv in sorted(sizes, key=lambda size: (size[0] * size[1], size)):
        yield (per_kv,) * kv


def _has_head_dim(child: PreTrainedModel, head_dim: int) -> bool:
    """Whether all parts of a stock class use this width of a head.

    If it is no field of the configuration, some parts may derive it from the number of heads.
    """
    config: Any = child.config
    if "head_dim" not in type(config).__dataclass_fields__:
        return bool(config.hidden_size // config.num_attention_heads == head_dim)
    return {block.head_dim for block in Layout.of(child).decoder.attention.values()} == {head_dim}


def _filled(layout: Layout, shapes: list[LayerShape], padded: LayerShape) -> torch.Tensor:
    """The units of the padded model that hold the pruned model's: bool [P]."""
    keep = torch.zeros(len(layout), dtype=torch.bool)
    per_kv = padded.q_heads_per_kv[0]
    for group in layout.groups:
        shape = shapes[group.layer]
        if not isinstance(group.block, AttentionBlock):
            places: list[int] = list(range(shape.channels or 0))
        elif shape.alibi_heads is not None:
            places = list(shape.alibi_heads)
        else:
            places = [
                kv * per_kv + query
                for kv, count in enumerate(shape.q_heads_per_kv)
                for query in range(count)
            ]
        if max(places, default=0) >= len(group):  # its width is not the one of the configuration
            raise ValueError(f"layer {group.layer} of the stock class is too narrow")
        keep[group.start + torch.tensor(places, dtype=torch.int64)] = True
    return keep
