"""How a model's layers are cut, in the plain values that travel in the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.hub import pruned_config
from bonsai_fast.models import AttentionBlock, Block, Cut, Decoder, ExpertsBlock, MLPBlock
from bonsai_fast.models.router_mask import CHOSEN, COUNTS

# Attributes of modules that hold a number which follows from the heads or channels that are left.
HEADS = frozenset({"num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head"})
KV_HEADS = frozenset({"num_key_value_heads", "num_kv_heads", "kv_heads"})
QUERY_WIDTHS = frozenset(
    {"embed_dim", "split_size", "hidden_size", "all_head_size", "attention_hidden_size"}
)
KV_WIDTHS = frozenset({"kv_dim"})
CHANNELS = frozenset({"intermediate_size", "intermediate_dim", "ffn_dim", "inner_dim"})
EXPERT_CHANNELS = frozenset({"intermediate_size", "intermediate_dim", "expert_dim", "ffn_dim"})
# arguments that bring an attention one bias for each of the dense model's heads
ALIBI_ARGUMENTS = ("alibi", "position_bias")


def cut_table(parent: PreTrainedModel, decoder: Decoder) -> dict[str, Any]:
    """`HeterogeneousConfig.cut_table` for a model and the decoder that was found in it.

    Raises:
        ValueError: heads or channels own different numbers of rows.
    """
    if (pruned := pruned_config(parent.config)) is not None:
        found: dict[str, Any] = pruned.cut_table
        return found
    kinds: list[dict[str, Any]] = []
    kind_of_layer = []
    for layer in range(decoder.num_layers):
        kind = {
            name: _sublayer(parent, f"{decoder.path}.{layer}.", block)
            for name, block in _sublayers(decoder, layer).items()
        }
        if kind not in kinds:
            kinds.append(kind)
        kind_of_layer.append(kinds.index(kind))
    prefix = f"{parent.base_model_prefix}."
    table: dict[str, Any] = {"layers": decoder.path.removeprefix(prefix), "kinds": kinds}
    if len(kinds) > 1:
        table["kind_of_layer"] = kind_of_layer
    text = parent.config.get_text_config()
    if text.is_heterogeneous:
        own = text.to_dict()["per_layer_config"]
        table["dense_layers"] = {str(int(layer)): entry for layer, entry in own.items()}
    return table


def alibi_argument(model: PreTrainedModel, block: AttentionBlock) -> str | None:
    """Argument of an attention that brings a bias for each head of the dense model, if any."""
    if not getattr(model.config.get_text_config(), "alibi", True):
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


def _sublayer(model: PreTrainedModel, prefix: str, block: Block) -> dict[str, Any]:
    def inside(paths: Iterable[str]) -> list[str]:
        return [path.removeprefix(prefix) for path in paths]

    entry: dict[str, Any] = {
        "modules": inside(block.modules),
        # experts have no projection that could leave a bias
        "output": None if isinstance(block, ExpertsBlock) else block.output.removeprefix(prefix),
        "norms": inside(block.norms),
        "returns": block.returns,
    }
    groups = [group for group in _groups(block) if group.cuts]
    if not groups:
        return entry
    if isinstance(block, AttentionBlock) and (argument := alibi_argument(model, block)):
        entry["alibi"] = argument
    sizes: dict[str, dict[str, dict[str, int]]] = {}
    for group in groups:
        entry |= group.parts
        for cut in group.cuts:
            name = cut.parameter.removeprefix(prefix)
            sizes.setdefault(name, {})[str(cut.dim)] = _shares(cut, group.parts)
    entry |= {"sizes": sizes, "counts": _counts(model, prefix, block)}
    if isinstance(block, ExpertsBlock):
        entry["limits"] = _limits(model, prefix, block)
    return entry


class _Group(NamedTuple):
    """Cuts, and what their owners are, in the order of their numbers."""

    cuts: tuple[Cut, ...]
    parts: dict[str, int]


def _groups(block: Block) -> list[_Group]:
    if isinstance(block, AttentionBlock):
        return [_Group(block.cuts, {"heads": block.num_heads, "kv_heads": block.num_kv_heads})]
    if isinstance(block, MLPBlock):
        return [_Group(block.cuts, {"channels": block.num_channels})]
    by_expert = () if block.experts_refused else (*block.by_expert, *block.buffers)
    by_channel = () if block.channels_refused else block.by_channel
    return [
        _Group(by_expert, {"experts": block.num_experts}),
        _Group(by_channel, {"expert_channels": block.num_channels}),
    ]


def _shares(cut: Cut, parts: dict[str, int]) -> dict[str, int]:
    """How many indices belong to each query head, KV head, channel or expert."""
    owned = cut.owner.bincount(minlength=sum(parts.values()))
    shares = {}
    for name, each in zip(parts, owned.split(list(parts.values())), strict=True):
        if len(different := set(each.tolist())) > 1:
            raise ValueError(
                f"{cut.parameter}: {name} own different numbers of indices: {sorted(different)}"
            )
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
        known = []
        if block.experts_refused is None:
            known.append((frozenset(COUNTS), block.num_experts, {"experts": 1}))
        if block.channels_refused is None:
            known.append((EXPERT_CHANNELS, block.num_channels, {"expert_channels": 1}))
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
    if block.experts_refused is not None:
        return {}
    modules = model.get_submodule(block.module).named_modules(prefix=block.module)
    return {
        f"{path}.{attribute}".removeprefix(prefix): "experts"
        for path, module in modules
        for attribute in _numbers(module).keys() & set(CHOSEN)
    }


def _numbers(module: nn.Module) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if type(value) is int}
