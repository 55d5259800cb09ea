"""How large a saved model is, layer by layer and on disk, read from its directory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

from bonsai_fast.checkpoints.meta_model import OUTDATED
from bonsai_fast.checkpoints.safetensors_reader import open_checkpoint
from bonsai_fast.hub import HeterogeneousConfig
from bonsai_fast.hub.configuration_bonsai import (
    CHANNELS_ATTRIBUTES,
    EXPERT_CHANNELS_ATTRIBUTES,
    EXPERTS_ATTRIBUTES,
)

KINDS = ("query heads", "KV heads", "MLP channels", "experts", "channels in each expert")
# how many of KINDS a layer has; None if it has none, or the configuration does not say
Widths = tuple[int | None, ...]
PARTS = ("heads", "kv_heads", "channels", "experts", "expert_channels")


def layer_widths(directory: Path) -> tuple[list[Widths], list[Widths] | None]:
    """What every layer has; what it had in the dense model, if the configuration says."""
    try:
        found: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError):  # a class of its own
        return [], None
    config = found.get_text_config()
    if not isinstance(config, HeterogeneousConfig):
        if not hasattr(config, "num_hidden_layers"):
            return [], None
        return [_layer(layer) for layer in config.per_layer_config], None
    pruned = cast(Any, config)
    layers: list[Widths] = [
        (s.num_heads, s.num_kv_heads, s.channels, s.experts, s.expert_channels)
        for s in pruned.layer_shapes()
    ]
    dense: list[Widths] = []
    for index in range(len(layers)):
        sublayers = (pruned.kind_of_layer(index) or {}).values()
        numbers = {part: entry[part] for entry in sublayers for part in PARTS if part in entry}
        dense.append(tuple(numbers.get(part) for part in PARTS))
    if pruned.cut_table is None:
        with pruned.as_dense():
            dense = [_layer(pruned.per_layer_config[0])] * len(layers)
    return layers, dense


def _layer(config: Any) -> Widths:
    """What the configuration of a stock model says of a layer."""

    def first(names: Iterable[str]) -> int | None:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if value is not None), None)

    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    experts = first(EXPERTS_ATTRIBUTES)
    if experts is not None:  # which layers are dense, it does not say in any common way
        return heads, kv_heads, None, experts, first(EXPERT_CHANNELS_ATTRIBUTES)
    return heads, kv_heads, first(CHANNELS_ATTRIBUTES), None, None


def weight_size(directory: Path | None) -> tuple[int | None, int | None]:
    """Parameters and bytes in a directory's weight files; None where there are none to read."""
    try:
        tensors = open_checkpoint(directory).tensors if directory else {}
    except (ValueError, OSError, SafetensorError):  # in another format
        tensors = {}
    buffers = re.compile("|".join(OUTDATED))
    sizes = [
        tensor.num_bytes // tensor.dtype.itemsize
        for name, tensor in tensors.items()
        if tensor.dtype.is_floating_point and not buffers.search(name)
    ]
    return sum(sizes) or None, sum(tensor.num_bytes for tensor in tensors.values()) or None
