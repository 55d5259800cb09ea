"""Reads what a LLaMA-like decoder computes from the modules of a loaded model.

Every parameter of a layer must be accounted for, and `self_check` then compares with the model
itself, so an unknown part is refused and never ignored.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import LayerStream, stream_of
from bonsai_fast.models import AttentionBlock, Block, MLPBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused.activations import kernel_name
from bonsai_fast.scoring.fused.parent import (
    MLP,
    Attention,
    Norm,
    Projection,
    Removed,
    Structure,
    SubLayer,
    UnsupportedStructureError,
)

ATTENTION_NORM, MLP_NORM, FINAL_NORM = "input_layernorm", "post_attention_layernorm", "norm"
ACTIVATION_NAMES = ("act_fn", "activation_fn")


class _StreamedSublayers(Sequence[SubLayer]):
    """Sub-layers of a streamed model; reading one brings its layer's weights into memory."""

    def __init__(self, model: PreTrainedModel, layout: Layout, stream: LayerStream) -> None:
        self._model, self._layout, self._stream = model, layout, stream

    def __len__(self) -> int:
        return 2 * self._stream.num_layers

    def __getitem__(self, depth):  # type: ignore[no-untyped-def]
        layer, place = divmod(depth, 2)
        self._stream.bring_in(layer)
        return _layer(self._model, self._layout, layer)[place]


def read_structure(model: PreTrainedModel, layout: Layout) -> Structure:
    """Describe a loaded model. Cheap: tensors are not copied.

    Raises:
        UnsupportedStructureError: the model is not a LLaMA-like decoder.
    """
    decoder = layout.decoder
    backbone = model.base_model
    path, _, name = decoder.path.rpartition(".")
    parent = model.get_submodule(path)
    if name != "layers" or parent is not backbone:
        raise UnsupportedStructureError(f"expected the layers in {type(backbone).__name__}.layers")
    stream = stream_of(model)
    streamed = "" if stream is None else f"{stream.path}."
    devices = {
        parameter.device
        for name, parameter in model.named_parameters()
        if not (streamed and name.startswith(streamed))
    }
    if len(devices) > 1 or torch.device("meta") in devices:
        raise UnsupportedStructureError(
            f"expected all parameters on one device, found {sorted(map(str, devices))}"
        )
    rotary = getattr(backbone, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise UnsupportedStructureError(f"{type(backbone).__name__} has no rotary_emb")
    sublayers: list[SubLayer] = []
    for index in range(decoder.num_layers):
        sublayers += _layer(model, layout, index)
    norm = _norm(backbone, FINAL_NORM)
    blocks: list[Block | None] = [
        None if isinstance(each, Removed) else each.block for each in sublayers
    ]
    found: Sequence[SubLayer] = tuple(sublayers)
    if stream is not None:
        found = _StreamedSublayers(model, layout, stream)
    return Structure(model.get_input_embeddings(), rotary, found, blocks, norm)


def _layer(model: PreTrainedModel, layout: Layout, index: int) -> list[SubLayer]:
    path = f"{layout.decoder.path}.{index}"
    layer = model.get_submodule(path)
    seen: set[str] = set()
    attention, mlp = layout.decoder.attention.get(index), layout.decoder.mlp.get(index)
    found: list[SubLayer] = [
        _attention(model, layer, path, attention, seen)
        if attention
        else _removed(layer, path, "self_attn", seen),
        _mlp(layer, path, mlp, seen) if mlp else _removed(layer, path, "mlp", seen),
    ]
    left = sorted({name for name, _ in layer.named_parameters()} - seen)
    if left:
        raise UnsupportedStructureError(f"{path} has an unknown parameter {left[0]}")
    return found


def _attention(
    model: PreTrainedModel, layer: nn.Module, path: str, block: AttentionBlock, seen: set[str]
) -> Attention:
    name = block.module.removeprefix(f"{path}.")
    module = layer.get_submodule(name)
    norm = _norm(layer, ATTENTION_NORM, seen)
    heads, kv_heads = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
    output = block.output.removeprefix(f"{path}.")
    if hasattr(module, "qkv_proj"):
        qkv = _linear(layer, f"{name}.qkv_proj", seen)
        query, key, value = _split(qkv, (heads, kv_heads, kv_heads))
    elif hasattr(module, "q_proj"):
        query, key, value = (_linear(layer, f"{name}.{part}_proj", seen) for part in "qkv")
    else:
        raise UnsupportedStructureError(f"{block.module} has no q_proj, k_proj and v_proj")
    scale = getattr(module, "scaling", None)
    if not isinstance(scale, float):
        raise UnsupportedStructureError(f"{block.module} has no scaling")
    if getattr(module, "attn_logit_softcapping", None) is not None:
        raise UnsupportedStructureError(f"{block.module} caps its attention scores")
    norms = [
        _norm(module, part, seen, f"{name}.") if hasattr(module, part) else None
        for part in ("q_norm", "k_norm")
    ]
    for part in norms:
        if part is not None and part.weight.shape != (block.head_dim,):
            raise UnsupportedStructureError(
                f"{block.module}: expected norms of q and k over one head each"
            )
    return Attention(
        block, norm, query, key, value, _linear(layer, output, seen), norms[0], norms[1], scale,
        _window(model, module, block),
    )  # fmt: skip


def _window(model: PreTrainedModel, module: nn.Module, block: AttentionBlock) -> int | None:
    config = model.config
    if hasattr(module, "sliding_window"):
        return cast("int | None", module.sliding_window)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kind = kinds[block.layer]
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedStructureError(
                f"{block.module}: expected full_attention or sliding_attention, got {kind}"
            )
        return int(config.sliding_window) if kind == "sliding_attention" else None
    # a class without the option has a model without windows, whatever config.json says
    return config.sliding_window if hasattr(type(config), "sliding_window") else None


def _mlp(layer: nn.Module, path: str, block: MLPBlock, seen: set[str]) -> MLP:
    output = block.output.removeprefix(f"{path}.")
    name = output.rpartition(".")[0]
    module = layer.get_submodule(name)
    norm = _norm(layer, MLP_NORM, seen)
    if hasattr(module, "gate_up_proj"):
        gate_up = _linear(layer, f"{name}.gate_up_proj", seen)
        gate, up = _split(gate_up, (block.num_channels, block.num_channels))
    elif hasattr(module, "gate_proj"):
        gate, up = (_linear(layer, f"{name}.{part}_proj", seen) for part in ("gate", "up"))
    else:
        raise UnsupportedStructureError(f"{path}.{name} is not a gated MLP")
    activation = next(
        (getattr(module, part) for part in ACTIVATION_NAMES if hasattr(module, part)), None
    )
    if activation is None:
        raise UnsupportedStructureError(f"{path}.{name} has none of {ACTIVATION_NAMES}")
    down = _linear(layer, output, seen)
    return MLP(block, norm, gate, up, down, activation, kernel_name(activation))


def _removed(layer: nn.Module, path: str, name: str, seen: set[str]) -> Removed:
    module = getattr(layer, name, None)
    if module is None:
        raise UnsupportedStructureError(f"{path} has no {name}")
    parameters = dict(module.named_parameters())
    seen.update(f"{name}.{parameter}" for parameter in parameters)
    if any(not parameter.endswith(".bias") for parameter in parameters) or len(parameters) > 1:
        raise UnsupportedStructureError(
            f"{path}.{name}: expected at most a bias, left over from a removed sub-layer"
        )
    return Removed(next(iter(parameters.values()), None))


def _linear(layer: nn.Module, name: str, seen: set[str]) -> Projection:
    module = layer.get_submodule(name)
    if type(module) is not nn.Linear:
        raise UnsupportedStructureError(f"{name} is a {type(module).__name__}, not an nn.Linear")
    seen.update(f"{name}.{parameter}" for parameter, _ in module.named_parameters())
    return Projection(module.weight, module.bias)


def _split(projection: Projection, sizes: tuple[int, ...]) -> list[Projection]:
    """A fused projection as its parts, which share its memory."""
    bias = projection.bias
    biases = [None] * len(sizes) if bias is None else list(bias.split(sizes))
    return [Projection(w, b) for w, b in zip(projection.weight.split(sizes), biases, strict=True)]


def _norm(parent: nn.Module, name: str, seen: set[str] | None = None, prefix: str = "") -> Norm:
    module = getattr(parent, name, None)
    if module is None:
        raise UnsupportedStructureError(f"{type(parent).__name__} has no {name}")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(eps, float) or weight is None:
        raise UnsupportedStructureError(f"{name} is a {type(module).__name__}, not an RMS norm")
    if seen is not None:
        seen.add(f"{prefix}{name}.weight")
    return Norm(weight, eps, _adds_one(cast(Hashable, type(module))))


@cache
def _adds_one(norm: Any) -> bool:
    """Whether a norm of this class multiplies by 1 + weight, found by trying it."""
    try:
        probe = norm(8)
    except TypeError as error:
        raise UnsupportedStructureError(
            f"{norm.__name__} is not known to be an RMS norm"
        ) from error
    assert isinstance(probe.weight, Tensor)
    with torch.no_grad():
        probe.weight.fill_(1.0)
        return bool((probe(torch.ones(1, 8)) > 1.5).all())
