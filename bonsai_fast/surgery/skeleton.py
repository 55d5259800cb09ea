"""The smaller model without its weights: its class, configuration and modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bonsai_fast.hub import (
    HeterogeneousConfig,
    LayerShape,
    hub_classes,
    model_types,
    pruned_config,
)
from bonsai_fast.hub.configuration_bonsai import (
    CHANNELS_ATTRIBUTES,
    EXPERT_CHANNELS_ATTRIBUTES,
    EXPERTS_ATTRIBUTES,
    PREFIX,
    bonsai_config,
)
from bonsai_fast.models import Decoder, family_of
from bonsai_fast.surgery.cut_table import cut_table
from bonsai_fast.surgery.kept import Kept

# Names of the number of experts that a token passes.
CHOSEN_ATTRIBUTES = ("num_experts_per_tok", "moe_k")
# Fields of a bonsai_* configuration that its stock class may not know.
BONSAI_FIELDS = (
    *("per_layer_config", "auto_map", "cut_table", "head_dim", "num_key_value_heads"),
    *("q_heads_per_kv", "alibi_heads", "output_bias"),
)


def build_structure(parent: PreTrainedModel, decoder: Decoder, kept: Kept) -> PreTrainedModel:
    """Build the smaller model on the meta device.

    It has the parent's stock class if that can express the result, else the bonsai_* class that is
    made from it.

    Raises:
        ValueError: neither class can.
    """
    if (stock := _stock_structure(parent, kept)) is not None:
        return stock
    if not has_bonsai_class(parent):
        raise ValueError(
            f"{type(parent).__name__} (model type {parent.config.model_type!r}) can only be pruned "
            "to what its own configuration can express: all layers equal, all KV groups equal, no "
            "sub-layer removed; causal language models of transformers itself can be pruned by any "
            "mask"
        )
    child = bonsai_structure(parent, cut_table(parent, decoder), kept.shapes)
    if not _expresses(child, parent, kept):
        raise ValueError(f"the model's parameters are not those of a {type(child).__name__}")
    return child


def has_bonsai_class(model: PreTrainedModel) -> bool:
    """Whether there is a class for a model's uneven results: its own is transformers' causal LM."""
    name = model_types().get(family_of(model.config.model_type))
    return type(model).__name__.removeprefix(PREFIX) == name


def bonsai_structure(
    parent: PreTrainedModel, table: dict[str, Any], shapes: Sequence[LayerShape]
) -> PreTrainedModel:
    """A model of the bonsai_* class with these layer shapes, on the meta device.

    A layer may have an attention again that it had lost.

    Args:
        parent: the model, dense or pruned before.
        table: `HeterogeneousConfig.cut_table`.
        shapes: of all layers.
    """
    classes = hub_classes(family_of(parent.config.model_type))
    text = parent.config.get_text_config()
    config_class: Any = type(text) if _is_bonsai(text) else bonsai_config(type(text))
    dense = table.get("dense_layers", {})
    entries = {}
    for index, shape in enumerate(shapes):
        entry = dense.get(str(index), {}) | config_class.layer_overrides(shape)
        if entry:
            entries[str(index)] = entry
    values = _values(text, drop=("auto_map",)) | {"cut_table": table, "per_layer_config": entries}
    if (head_dim := _head_dim(text)) is not None:
        values["head_dim"] = head_dim
    config = config_class(**values)
    if text is not parent.config:
        config = _around(parent.config, text, config, cast(Any, classes.config))
    return _on_meta(classes.causal_lm, config)


def _around(wrapper: PreTrainedConfig, text: Any, new_text: Any, config_class: Any) -> Any:
    """A wrapper's configuration with another one for its text model."""
    place = next(name for name in wrapper.sub_configs if getattr(wrapper, name) is text)
    values = _values(wrapper, drop=("auto_map",))
    # the vision tower's and others as they are
    parts = {name: getattr(wrapper, name) for name in wrapper.sub_configs}
    values |= {name: copy.deepcopy(part) for name, part in parts.items()}
    implementations = {n: part._attn_implementation for n, part in parts.items() if part}
    values["attn_implementation"] = implementations | {"": wrapper._attn_implementation}
    return config_class(**(values | {place: new_text}))


def _stock_structure(parent: PreTrainedModel, kept: Kept) -> PreTrainedModel | None:
    """A model of the parent's stock class, if it can have exactly the kept shapes."""
    if not kept.slices and not kept.removed and pruned_config(parent.config) is None:
        return _on_meta(type(parent), copy.deepcopy(parent.config))
    fields = ("q_heads_per_kv", "channels", "experts", "expert_channels")
    alike = {name: {getattr(shape, name) for shape in kept.shapes} - {None} for name in fields}
    renumbered = any(shape.alibi_heads is not None for shape in kept.shapes)
    gone = any(shape.removed for shape in kept.shapes)
    if any(len(values) > 1 for values in alike.values()) or gone or renumbered:
        return None
    shape = LayerShape(**{name: next(iter(values), None) for name, values in alike.items()})
    if shape.is_irregular or not _loads_as_stock(parent):
        return None
    child = stock_structure(parent, shape)
    return child if child is not None and _expresses(child, parent, kept) else None


def _loads_as_stock(parent: PreTrainedModel) -> bool:
    """Whether `AutoModelForCausalLM` finds the parent's class by its configuration.

    It does not for a language model whose class is registered by its wrapper's configuration alone.
    """
    names = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)}
    is_listed = type(parent).__name__ in names
    return not is_listed or type(parent.config) in MODEL_FOR_CAUSAL_LM_MAPPING


def stock_structure(parent: PreTrainedModel, shape: LayerShape) -> PreTrainedModel | None:
    """A model of the parent's stock class with this shape in all layers, on the meta device.

    None if the class's own checks refuse such widths.
    """
    try:
        return _on_meta(_stock_class(parent), _stock_config(parent.config, shape))
    except (ValueError, AttributeError, RuntimeError, StrictDataclassError):
        return None


def _stock_class(parent: PreTrainedModel) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = _stock_base(type(parent))
    return found


def _stock_base(made: type[Any]) -> type[Any]:
    """The stock class itself, or the one that a bonsai_* class is made from."""
    if not made.__name__.startswith(PREFIX):
        return made
    name = made.__name__.removeprefix(PREFIX)
    return next(base for base in made.__mro__ if base.__name__ == name)


def _stock_config(config: PreTrainedConfig, shape: LayerShape) -> PreTrainedConfig:
    """The stock configuration with the same widths for all layers; None: as they are."""
    text = config.get_text_config()
    changed = _stock_text_config(text, shape)
    if text is config:
        return changed
    return cast(PreTrainedConfig, _around(config, text, changed, _stock_base(type(config))))


def _stock_text_config(config: PreTrainedConfig, shape: LayerShape) -> PreTrainedConfig:
    head_dim = _head_dim(config)
    if _is_bonsai(config):
        stock_class = _stock_base(type(config))
        unknown = [name for name in BONSAI_FIELDS if name not in stock_class.__dataclass_fields__]
        dense: PreTrainedConfig = stock_class(**_values(config, drop=unknown))
        dense.per_layer_config = cast(Any, config).cut_table.get("dense_layers")
    else:
        dense = copy.deepcopy(config)
    widths: dict[str, Any] = {}
    if shape.num_heads is not None:
        widths["num_attention_heads"] = shape.num_heads
        if getattr(dense, "num_key_value_heads", None) is not None:
            widths["num_key_value_heads"] = shape.num_kv_heads
    for names, width in (
        (CHANNELS_ATTRIBUTES, shape.channels),
        (EXPERTS_ATTRIBUTES, shape.experts),
        (EXPERT_CHANNELS_ATTRIBUTES, shape.expert_channels),
    ):
        own = next((name for name in names if getattr(dense, name, None) is not None), None)
        if width is not None and own is not None:
            widths[own] = width
    for name in CHOSEN_ATTRIBUTES:
        if shape.experts is not None and getattr(dense, name, None) is not None:
            # a token passes at most as many as there are
            widths[name] = min(getattr(dense, name), shape.experts)
    for name, width in widths.items():
        setattr(dense, name, width)
    if _head_dim(dense) != head_dim:
        dense.head_dim = head_dim
    if hasattr(dense, "validate"):
        dense.validate()
    return dense


def _is_bonsai(config: PreTrainedConfig) -> bool:
    return isinstance(config, HeterogeneousConfig)


def _head_dim(config: PreTrainedConfig) -> int | None:
    known, heads, width = (
        config._getattr_without_heterogeneous_validation(name, None)
        for name in ("head_dim", "num_attention_heads", "hidden_size")
    )
    if known is not None:
        return int(known)
    return width // heads if isinstance(heads, int) and isinstance(width, int) else None


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
    own = (*parent.named_parameters(remove_duplicate=False), *parent.named_buffers())
    wanted = {name: kept.shape_of(name, tensor) for name, tensor in own if kept.keeps(name)}
    found = [*child.named_parameters(remove_duplicate=False), *child.named_buffers()]
    return wanted == {name: tuple(tensor.shape) for name, tensor in found}
