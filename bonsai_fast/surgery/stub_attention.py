"""Replace removed attentions by one head of zeros, for engines that need one in every layer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.hub import HeterogeneousConfig, LayerShape
from bonsai_fast.models import family_of
from bonsai_fast.surgery.kept import ALIBI_FAMILIES
from bonsai_fast.surgery.skeleton import bonsai_structure


def with_stub_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with an attention in every layer: a removed one is one head of zeros.

    Returns:
        a model that shares its other parameters with `model`; `model` itself if every layer has an
        attention.
    """
    if not isinstance(model.config, HeterogeneousConfig):
        return model
    shapes: list[LayerShape] = cast(Any, model.config).layer_shapes()
    if all(shape.num_heads for shape in shapes):
        return model
    numbers = (0,) if family_of(model.config.model_type) in ALIBI_FAMILIES else None
    stub = {"q_heads_per_kv": (1,), "alibi_heads": numbers}
    filled = [shape if shape.num_heads else replace(shape, **cast(Any, stub)) for shape in shapes]
    child = bonsai_structure(model, filled)
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
