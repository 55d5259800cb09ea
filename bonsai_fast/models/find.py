"""Find the decoder of a loaded Hugging Face model by its structure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models.blocks import AttentionBlock, Decoder, ExpertsBlock, MLPBlock
from bonsai_fast.models.experts import Verdicts, find_experts
from bonsai_fast.models.families import Norms, norms_of
from bonsai_fast.models.projections import ATTENTION_PATTERNS, MLP_PATTERNS, mlp_cuts, output_name


class UnsupportedModelError(ValueError):
    """The model has no decoder that can be pruned; the message names what was looked for."""


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the decoder layers of a causal language model and the parts of every sub-layer.

    Raises:
        UnsupportedModelError: no list of layers with known projections, or a layer lacks one of its
            sub-layers.
    """
    path, layers = _layer_list(model)
    norms = norms_of(model.config)
    attention, mlp, experts = {}, {}, {}
    verdicts: Verdicts = {}
    for index, layer in enumerate(layers):
        try:
            found_attention = _attention(model, layer, f"{path}.{index}", index, norms)
            found_experts = _experts(layer, f"{path}.{index}", index, norms, verdicts)
            found_mlp = None if found_experts else _mlp(layer, f"{path}.{index}", index, norms)
        except ValueError as error:
            raise UnsupportedModelError(f"{_describe(model)} cannot be pruned: {error}") from error
        if found_attention is not None:
            attention[index] = found_attention
        if found_mlp is not None:
            mlp[index] = found_mlp
        if found_experts is not None:
            experts[index] = found_experts
    whole = [block.experts_refused for block in experts.values() if block.experts_refused]
    refused = {"expert": whole[0]} if whole else {}
    return Decoder(
        model.config.model_type, path, len(layers), attention, mlp, refused, experts=experts
    )


def _describe(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model type {model.config.model_type!r})"


def _layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_decoder_layer(layer) for layer in module)
    ]
    if not candidates:
        attention = "; ".join(ATTENTION_PATTERNS)
        mlp = "; ".join(" + ".join((*inputs, output)) for inputs, output in MLP_PATTERNS)
        raise UnsupportedModelError(
            f"{_describe(model)} cannot be pruned: looked for a ModuleList whose layers hold "
            f"nn.Linear projections named [{attention}] with an output projection o_proj, out_proj "
            f"or dense, and an MLP of [{mlp}]; found none"
        )
    return max(candidates, key=lambda candidate: len(candidate[1]))


def _children(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A layer's sub-layers: its children, or the layer itself (OPT keeps fc1 and fc2 there)."""
    yield from layer.named_children()
    yield "", layer


def _is_decoder_layer(layer: nn.Module) -> bool:
    if hasattr(layer, "removed_sublayers"):  # pruned before, perhaps of all its attention
        return True
    return any(
        output_name(child) is not None and _head_dim(child) is not None
        for _, child in _children(layer)
    )


def _is_removed(layer: nn.Module, sublayer: str) -> bool:
    return sublayer in getattr(layer, "removed_sublayers", ())


def _head_dim(attention: nn.Module) -> int | None:
    value = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    return int(value) if value else None


def _num_kv_heads(attention: nn.Module, heads: int, head_dim: int) -> int:
    if isinstance(k_proj := getattr(attention, "k_proj", None), nn.Linear):
        return k_proj.out_features // head_dim
    if isinstance(qkv_proj := getattr(attention, "qkv_proj", None), nn.Linear):
        return (qkv_proj.out_features // head_dim - heads) // 2
    return heads


def _kv_of_head(attention: nn.Module, heads: int, kv_heads: int) -> tuple[int, ...]:
    groups = getattr(attention, "q_heads_per_kv", None)
    if groups is None:
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
        groups = [heads // kv_heads] * kv_heads
    return tuple(kv for kv, count in enumerate(groups) for _ in range(count))


def _attention(
    model: PreTrainedModel, layer: nn.Module, path: str, index: int, norms: Norms
) -> AttentionBlock | None:
    if _is_removed(layer, "attention"):
        return None
    for name, child in layer.named_children():
        output, head_dim = output_name(child), _head_dim(child)
        if output is None or head_dim is None:
            continue
        width = cast(nn.Linear, child.get_submodule(output)).in_features
        heads, rest = divmod(width, head_dim)
        if rest:
            raise ValueError(
                f"{path}.{name}.{output} has {rest} input columns "
                f"beyond {heads} heads of {head_dim}"
            )
        kv_heads = _num_kv_heads(child, heads, head_dim)
        for pattern in ATTENTION_PATTERNS.values():
            cuts = pattern(child, f"{path}.{name}", heads, kv_heads, head_dim)
            if cuts is not None:
                own = (f"{path}.{norms.attention}",) if norms.attention else ()
                kv_of_head = _kv_of_head(child, heads, kv_heads)
                return AttentionBlock(
                    index,
                    f"{path}.{name}",
                    f"{path}.{name}.{output}",
                    head_dim,
                    kv_of_head,
                    cuts,
                    own,
                )
    raise ValueError(
        f"{path} holds no attention with projections named [{'; '.join(ATTENTION_PATTERNS)}]"
    )


def _experts(
    layer: nn.Module, path: str, index: int, norms: Norms, verdicts: Verdicts
) -> ExpertsBlock | None:
    if _is_removed(layer, "mlp"):
        return None
    own = (f"{path}.{norms.mlp}",) if norms.mlp else ()
    return find_experts(layer, path, index, own, verdicts)


def _mlp(layer: nn.Module, path: str, index: int, norms: Norms) -> MLPBlock | None:
    if _is_removed(layer, "mlp"):
        return None
    for name, child in _children(layer):
        child_path = f"{path}.{name}" if name else path
        if (found := mlp_cuts(child, child_path)) is not None:
            output, projections, channels, cuts = found
            modules = (
                (child_path,)
                if name
                else tuple(f"{path}.{projection}" for projection in projections)
            )
            own = (f"{path}.{norms.mlp}",) if norms.mlp else ()
            return MLPBlock(index, modules, f"{child_path}.{output}", channels, cuts, own)
    wanted = "; ".join(" + ".join((*inputs, output)) for inputs, output in MLP_PATTERNS)
    raise ValueError(f"{path} holds no MLP with projections named [{wanted}]")
