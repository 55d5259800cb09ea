"""How a model's layers are cut, in the plain values that travel in the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.hub import HeterogeneousConfig
from bonsai_fast.models import AttentionBlock, Block, Decoder, ExpertsBlock
from bonsai_fast.models.router_mask import CHOSEN, COUNTS
from bonsai_fast.surgery.calls import returned_values

# Attributes of modules that hold a number which follows from the heads or channels that are left.
HEADS = frozenset({"num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head"})
KV_HEADS = frozenset({"num_key_value_heads", "num_kv_heads", "kv_heads"})
QUERY_WIDTHS = frozenset(
    {"embed_dim", "split_size", "hidden_size", "all_head_size", "attention_hidden_size"}
)
KV_WIDTHS = frozenset({"kv_dim"})
CHANNELS = frozenset({"intermediate_size", "intermediate_dim", "ffn_dim", "inner_dim"})
# arguments that bring an attention one bias for each of the dense model's heads
ALIBI_ARGUMENTS = ("alibi", "position_bias")


def cut_table(parent: PreTrainedModel, decoder: Decoder) -> dict[str, Any]:
    """`HeterogeneousConfig.cut_table` for a model and the decoder that was found in it.

    Raises:
        ValueError: heads or channels own different numbers of rows.
    """
    config = parent.config
    if isinstance(config, HeterogeneousConfig):
        found: dict[str, Any] = cast(Any, config).cut_table
        return found
    returns = returned_values(parent, decoder)
    kinds: list[dict[str, Any]] = []
    kind_of_layer = []
    for layer in range(decoder.num_layers):
        kind = {
            name: _sublayer(parent, f"{decoder.path}.{layer}.", block, returns)
            for name, block in _sublayers(decoder, layer).items()
        }
        if kind not in kinds:
            kinds.append(kind)
        kind_of_layer.append(kinds.index(kind))
    prefix = f"{parent.base_model_prefix}."
    table: dict[str, Any] = {"layers": decoder.path.removeprefix(prefix), "kinds": kinds}
    return table | ({"kind_of_layer": kind_of_layer} if len(kinds) > 1 else {})


def alibi_argument(model: PreTrainedModel, block: AttentionBlock) -> str | None:
    """Argument of an attention that brings a bias for each head of the dense model, if any."""
    if not getattr(model.config, "alibi", True):
        return None
    forward = cast(Any, model.get_submodule(block.module).forward)
    names = inspect.signature(forward).parameters
    return next((name for name in ALIBI_ARGUMENTS if name in names), None)


def _sublayers(decoder: Decoder, layer: int) -> dict[str, Block]:
    blocks: dict[str, Block | None] = {
        "attention": decoder.attention.get(layer),
        "mlp": decoder.mlp.get(layer) or decoder.experts.get(layer),
    }
    return {name: block for name, block in blocks.items() if block is not None}


def _sublayer(
    model: PreTrainedModel, prefix: str, block: Block, returns: Mapping[str, int | None]
) -> dict[str, Any]:
    def inside(paths: Iterable[str]) -> list[str]:
        return [path.removeprefix(prefix) for path in paths]

    attention = isinstance(block, AttentionBlock)
    entry: dict[str, Any] = {
        "modules": inside(block.modules),
        # experts have no projection that could leave a bias
        "output": None if isinstance(block, ExpertsBlock) else block.output.removeprefix(prefix),
        "norms": inside(block.norms),
        "returns": returns.get(block.modules[0], 2 if attention else None),
    }
    if not block.cuts:
        return entry
    if isinstance(block, AttentionBlock):
        entry |= {"heads": block.num_heads, "kv_heads": block.num_kv_heads}
        if (argument := alibi_argument(model, block)) is not None:
            entry["alibi"] = argument
    else:
        entry[_part(block)] = block.num_parts
    buffers = block.buffers if isinstance(block, ExpertsBlock) else ()
    sizes: dict[str, dict[str, dict[str, int]]] = {}
    for cut in (*block.cuts, *buffers):
        share = _shares(cut.parameter, cut.owner, block)
        sizes.setdefault(cut.parameter.removeprefix(prefix), {})[str(cut.dim)] = share
    entry |= {"sizes": sizes, "counts": _counts(model, prefix, block)}
    if isinstance(block, ExpertsBlock):
        entry["limits"] = _limits(model, prefix, block)
    return entry


def _part(block: Block) -> str:
    return "experts" if isinstance(block, ExpertsBlock) else "channels"


def _shares(parameter: str, owner: torch.Tensor, block: Block) -> dict[str, int]:
    """How many indices belong to each query head, KV head, channel or expert."""
    owned = owner.bincount(minlength=block.num_parts)
    if isinstance(block, AttentionBlock):
        parts = {"heads": owned[: block.num_heads], "kv_heads": owned[block.num_heads :]}
    else:
        parts = {_part(block): owned}
    shares = {}
    for name, each in parts.items():
        if len(different := set(each.tolist())) > 1:
            raise ValueError(f"{parameter}: {name} own different numbers of rows: {different}")
        if (share := different.pop()) > 0:
            shares[name] = share
    return shares


def _counts(model: PreTrainedModel, prefix: str, block: Block) -> dict[str, dict[str, int]]:
    """The numbers in a sub-layer's modules that follow from what is kept."""
    if isinstance(block, AttentionBlock):
        heads, kv_heads, width = block.num_heads, block.num_kv_heads, block.head_dim
        known = [
            (HEADS, heads, {"heads": 1}),
            (KV_HEADS, kv_heads, {"kv_heads": 1}),
            (QUERY_WIDTHS, heads * width, {"heads": width}),
            (KV_WIDTHS, kv_heads * width, {"kv_heads": width}),
            (frozenset({"num_key_value_groups"}), heads // kv_heads, {"groups": 1}),
        ]
    elif isinstance(block, ExpertsBlock):
        known = [(frozenset(COUNTS), block.num_experts, {"experts": 1})]
    else:
        known = [(CHANNELS, block.num_channels, {"channels": 1})]
    found = {}
    for path in block.modules:
        for inner, module in model.get_submodule(path).named_modules(prefix=path):
            for attribute, value in _numbers(module).items():
                for names, number, shares in known:
                    if attribute in names and value == number:
                        found[f"{inner}.{attribute}".removeprefix(prefix)] = shares
    return found


def _limits(model: PreTrainedModel, prefix: str, block: ExpertsBlock) -> dict[str, str]:
    """The numbers in a mixture's modules that may not be larger than the number of experts."""
    modules = model.get_submodule(block.module).named_modules(prefix=block.module)
    return {
        f"{path}.{attribute}".removeprefix(prefix): "experts"
        for path, module in modules
        for attribute in _numbers(module).keys() & set(CHOSEN)
    }


def _numbers(module: nn.Module) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if type(value) is int}
