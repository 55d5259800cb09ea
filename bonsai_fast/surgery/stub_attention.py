"""Replace removed attentions by one head of zeros, for engines that need one in every layer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.hub import LayerShape, pruned_config
from bonsai_fast.surgery.skeleton import bonsai_structure


def with_stub_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with an attention in every layer: a removed one is one head of zeros.

    Returns:
        a model that shares its other parameters with `model`; `model` itself if every layer has an
        attention.
    """
    config = pruned_config(model.config)
    if config is None:
        return model
    shapes: list[LayerShape] = config.layer_shapes()
    if not any("attention" in shape.removed for shape in shapes):
        return model
    filled = [
        replace(shape, q_heads_per_kv=(1,), alibi_heads=_first_head(config, index))
        if "attention" in shape.removed
        else shape
        for index, shape in enumerate(shapes)
    ]
    child = bonsai_structure(model, config.cut_table, filled)
    known = dict(model.named_parameters(remove_duplicate=False))
    like = next(model.parameters())
    for name, empty in list(child.named_parameters(remove_duplicate=False)):
        module, _, attribute = name.rpartition(".")
        parameter = known.get(name)
        if parameter is None:
            # the value of a norm's weight has no effect: its output is multiplied by zeros
            fill = float(empty.dim() == 1 and attribute == "weight")
            data = torch.full(empty.shape, fill, dtype=like.dtype, device=like.device)
            parameter = nn.Parameter(data)
        setattr(child.get_submodule(module), attribute, parameter)
    for name, _ in list(child.named_buffers()):
        module, _, attribute = name.rpartition(".")
        buffer = model.get_submodule(module).get_buffer(attribute)
        setattr(child.get_submodule(module), attribute, buffer)
    child.generation_config = copy.deepcopy(model.generation_config)
    child.train(model.training)
    return child


def _first_head(config: Any, layer: int) -> tuple[int, ...] | None:
    """What one head of zeros is numbered, if the model numbers its heads."""
    return (0,) if config.kind_of_layer(layer)["attention"].get("alibi") else None
