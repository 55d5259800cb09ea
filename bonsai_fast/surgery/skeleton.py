"""The smaller model without its weights: its class, configuration and modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from bonsai_fast.hub import FAMILIES, LayerShape, hub_classes
from bonsai_fast.hub.heterogeneous_config import NO_ATTENTION
from bonsai_fast.models import family_of
from bonsai_fast.surgery.kept import Kept

# Names of the MLP width in configurations; the first that a configuration has is its own.
CHANNELS_ATTRIBUTES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
# The same for the number of experts, and for how many of them a token passes.
EXPERTS_ATTRIBUTES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERT_CHANNELS_ATTRIBUTES = ("moe_intermediate_size", "intermediate_size")
CHOSEN_ATTRIBUTES = ("num_experts_per_tok", "moe_k")
# Fields of a bonsai_* configuration that its stock class does not know.
BONSAI_FIELDS = ("per_layer_config", "auto_map", "head_dim", "q_heads_per_kv", "alibi_heads")


def build_structure(parent: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """Build the smaller model on the meta device.

    It has the parent's stock class if that can express the result, else the family's bonsai_*
    class.

    Raises:
        ValueError: neither class can.
    """
    if (stock := _stock_structure(parent, kept)) is not None:
        return stock
    family = family_of(parent.config.model_type)
    if family not in FAMILIES or type(parent).__name__.removeprefix("Bonsai") != (
        f"{FAMILIES[family]}ForCausalLM"
    ):
        raise ValueError(
            f"{type(parent).__name__} (model type {parent.config.model_type!r}) can only be pruned "
            "to what its own configuration can express: all layers equal, all KV groups equal, no "
            "sub-layer removed; models of these types can be pruned by any mask: "
            f"{', '.join(FAMILIES)}"
        )
    child = bonsai_structure(parent, kept.shapes)
    if not _expresses(child, parent, kept):
        raise ValueError(f"the model's parameters are not those of a {type(child).__name__}")
    return child


def bonsai_structure(parent: PreTrainedModel, shapes: Sequence[LayerShape]) -> PreTrainedModel:
    """A model of the family's bonsai_* class with these layer shapes, on the meta device.

    A layer may have an attention again that it had lost.
    """
    classes = hub_classes(family_of(parent.config.model_type))
    entries = {
        str(index): entry
        for index, shape in enumerate(shapes)
        if (entry := classes.config.layer_overrides(shape))
    }
    values = _values(parent.config, drop=("auto_map",))
    values |= {"head_dim": _head_dim(parent.config), "per_layer_config": entries}
    return _on_meta(classes.causal_lm, classes.config(**_with_attention(values)))


def _with_attention(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the marks of layers without attention: these follow from the shapes."""
    if values.get("layer_types") is None:
        return values
    types = ["full_attention" if kind == NO_ATTENTION else kind for kind in values["layer_types"]]
    return values | {"layer_types": types}


def _stock_structure(parent: PreTrainedModel, kept: Kept) -> PreTrainedModel | None:
    """A model of the parent's stock class, if it can have exactly the kept shapes."""
    first = kept.shapes[0]
    mixtures = kept.experts.keys() | kept.expert_channels.keys()
    dense = [shape for layer, shape in enumerate(kept.shapes) if layer not in mixtures]
    heads, widths = {shape.q_heads_per_kv for shape in kept.shapes}, {s.channels for s in dense}
    counts, inner = set(kept.experts.values()), set(kept.expert_channels.values())
    if len(heads) > 1 or max(len(widths), len(counts), len(inner)) > 1:
        return None
    if 0 in widths | counts | inner:
        return None
    if first.is_irregular or not first.num_heads:
        return None
    shape = replace(first, channels=widths.pop() if widths else 0)
    child = stock_structure(
        parent,
        shape,
        num_experts=counts.pop() if counts else None,
        expert_channels=inner.pop() if inner else None,
    )
    return child if child is not None and _expresses(child, parent, kept) else None


def stock_structure(
    parent: PreTrainedModel,
    shape: LayerShape,
    *,
    num_experts: int | None = None,
    expert_channels: int | None = None,
) -> PreTrainedModel | None:
    """A model of the parent's stock class with this shape in all layers, on the meta device.

    None if the class's own checks refuse such widths.

    Args:
        parent: dense or pruned.
        shape: of every layer; without channels where no layer has a dense MLP.
        num_experts, expert_channels: of every mixture of experts; None: as many as there are.
    """
    try:
        config = _stock_config(parent.config, shape)
        if num_experts is not None:
            _set_experts(config, num_experts)
        if expert_channels is not None:
            _set_first(config, EXPERT_CHANNELS_ATTRIBUTES, expert_channels)
        return _on_meta(_stock_class(parent), config)
    except (ValueError, StrictDataclassError):
        return None


def _stock_class(parent: PreTrainedModel) -> type[PreTrainedModel]:
    if not _is_bonsai(parent.config):
        return type(parent)
    name = type(parent).__name__.removeprefix("Bonsai")
    return next(base for base in type(parent).__mro__ if base.__name__ == name)


def _stock_config(config: PreTrainedConfig, shape: LayerShape) -> PreTrainedConfig:
    """The stock configuration with the same widths for all layers."""
    head_dim = _head_dim(config)
    if _is_bonsai(config):
        stock_class = CONFIG_MAPPING[family_of(config.model_type)]
        unknown = [name for name in BONSAI_FIELDS if name not in stock_class.__dataclass_fields__]
        values = _with_attention(_values(config, drop=unknown))
        if "layer_types" not in stock_class.__dataclass_fields__:
            values.pop("layer_types", None)
        dense = stock_class(**values)
    else:
        dense = copy.deepcopy(config)
    widths: dict[str, Any] = {"num_attention_heads": shape.num_heads}
    if getattr(dense, "num_key_value_heads", None) is not None:
        widths["num_key_value_heads"] = shape.num_kv_heads
    for name in CHANNELS_ATTRIBUTES:
        if shape.channels and getattr(dense, name, None) is not None:
            widths[name] = shape.channels
            break
    for name, width in widths.items():
        setattr(dense, name, width)
    if _head_dim(dense) != head_dim:
        dense.head_dim = head_dim
    if hasattr(dense, "validate"):
        dense.validate()
    return dense


def _set_experts(config: PreTrainedConfig, count: int) -> None:
    """A token passes at most as many experts as there are."""
    _set_first(config, EXPERTS_ATTRIBUTES, count)
    for name in CHOSEN_ATTRIBUTES:
        if getattr(config, name, None) is not None:
            setattr(config, name, min(getattr(config, name), count))


def _set_first(config: PreTrainedConfig, names: Iterable[str], value: int) -> None:
    """Set the first of these names that the configuration has."""
    name = next((name for name in names if getattr(config, name, None) is not None), None)
    if name is not None:
        setattr(config, name, value)


def _is_bonsai(config: PreTrainedConfig) -> bool:
    return family_of(config.model_type) != config.model_type


def _head_dim(config: PreTrainedConfig) -> int:
    if getattr(config, "head_dim", None) is not None:
        return int(config.head_dim)
    return int(config.hidden_size // config.num_attention_heads)


def _values(config: PreTrainedConfig, drop: Iterable[str] = ()) -> dict[str, Any]:
    """A configuration's values, to make another configuration from."""
    values = config.to_dict()
    for name in (
        "model_type",
        "transformers_version",
        "architectures",
        "quantization_config",
        *drop,
    ):
        values.pop(name, None)
    return values | {"attn_implementation": config._attn_implementation}


def _on_meta(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config)


def _expresses(child: PreTrainedModel, parent: PreTrainedModel, kept: Kept) -> bool:
    """Whether the child's parameters and buffers are exactly the kept ones of the parent."""
    wanted = {
        name: kept.shape_of(name, parameter)
        for name, parameter in parent.named_parameters(remove_duplicate=False)
        if kept.keeps(name)
    } | {name: kept.shape_of(name, buffer) for name, buffer in parent.named_buffers()}
    found = [*child.named_parameters(remove_duplicate=False), *child.named_buffers()]
    return wanted == {name: tuple(tensor.shape) for name, tensor in found}
