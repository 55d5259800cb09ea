"""How large a saved model is, layer by layer and on disk, read from its directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

from bonsai_fast.checkpoints.meta_model import OUTDATED
from bonsai_fast.checkpoints.safetensors_reader import open_checkpoint
from bonsai_fast.hub import HeterogeneousConfig
from bonsai_fast.hub.configuration_bonsai import CHANNELS_ATTRIBUTES

KINDS = ("query heads", "KV heads", "MLP channels")
# how many of KINDS a layer has; None if the configuration does not say
Widths = tuple[int | None, int | None, int | None]


def layer_widths(directory: Path) -> tuple[list[Widths], Widths | None]:
    """What every layer has; what every layer of the dense model had, if the configuration says."""
    try:
        found: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError):  # a class of its own
        return [], None
    config = found.get_text_config()
    if isinstance(config, HeterogeneousConfig):
        shapes = cast(Any, config).layer_shapes()
        layers = [(shape.num_heads, shape.num_kv_heads, shape.channels) for shape in shapes]
        with config.as_dense():
            return layers, _layer(config.per_layer_config[0], (config.channels_attribute,))
    if not hasattr(config, "num_hidden_layers"):
        return [], None
    return [_layer(layer, CHANNELS_ATTRIBUTES) for layer in config.per_layer_config], None


def _layer(config: Any, channels_attributes: tuple[str, ...]) -> Widths:
    heads = getattr(config, "num_attention_heads", None)
    channels = (getattr(config, name, None) for name in channels_attributes)
    return (
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        next((width for width in channels if width is not None), None),
    )


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
