"""Reads what an attention sub-layer computes from its module."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from bonsai_fast.models import AttentionBlock
from bonsai_fast.scoring.fused.layer_modules import LayerModules
from bonsai_fast.scoring.fused.parent import (
    Attention,
    Norm,
    Projection,
    QueryGrowth,
    UnsupportedStructureError,
)
from bonsai_fast.scoring.fused.read_rotary import function_of, read_rotary

# names of the norms of q, and of k; the last ones come after the rotary positions
HEAD_NORMS = (
    ("q_norm", "q_layernorm", "query_layernorm"),
    ("k_norm", "k_layernorm", "key_layernorm"),
)
# attention classes that apply their attn_logit_softcapping; Gemma 3 has the option and does not
CAPPED = ("Gemma2Attention", "VaultGemmaAttention")
# its module has this function if queries grow with their position
GROWTH_FUNCTION = "get_llama_4_attn_scale"


def read_attention(
    modules: LayerModules,
    block: AttentionBlock,
    config: Any,
    *,
    norm: Norm | None,
    post_norm: Norm | None,
    residual_factor: float,
    rotary_kinds: bool,
) -> Attention:
    """Describe an attention sub-layer.

    Args:
        modules: of its layer.
        block: its units.
        config: of the model.
        norm, post_norm, residual_factor: see `Attention`.
        rotary_kinds: see `Structure`.
    Raises:
        UnsupportedStructureError: something in it is unknown.
    """
    name = modules.inside(block.module)
    module = modules.layer.get_submodule(name)
    query, key, value = _projections(modules, module, name, block)
    head_dim, kv_of_head = _heads(module, block, query, key)
    query_norm, key_norm, norms_all_heads = _head_norms(
        modules, module, name, block, head_dim, kv_of_head
    )
    scale = getattr(module, "scaling", None)
    if not isinstance(scale, int | float):
        raise UnsupportedStructureError(f"{block.module} has no scaling")
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedStructureError(f"{block.module} clips q, k and v")
    kinds = getattr(config, "layer_types", None)
    kind = str(kinds[block.layer]) if rotary_kinds and kinds is not None else ""
    rotary = read_rotary(module, block.module, kind)
    norms_last = hasattr(module, HEAD_NORMS[0][-1])
    if norms_last and (norms_all_heads or (rotary is not None and rotary.interleaved)):
        raise UnsupportedStructureError(
            f"{block.module} normalises q behind its rotary positions in an unknown way"
        )
    return Attention(
        block=block,
        norm=norm,
        post_norm=post_norm,
        residual_factor=residual_factor,
        query=query,
        key=key,
        value=value,
        output=modules.linear(modules.inside(block.output)),
        head_dim=head_dim,
        kv_of_head=kv_of_head,
        query_norm=query_norm,
        key_norm=key_norm,
        norms_all_heads=norms_all_heads,
        norms_last=norms_last,
        scale=float(scale),
        softcap=_softcap(module, block),
        window=_window(config, module, block),
        rotary=rotary,
        query_growth=_query_growth(module, config),
    )


def _projections(
    modules: LayerModules, module: nn.Module, name: str, block: AttentionBlock
) -> list[Projection]:
    if hasattr(module, "qkv_proj"):
        qkv = modules.linear(f"{name}.qkv_proj")
        if block.whole is not None:
            raise UnsupportedStructureError(f"{block.module} has a fused qkv_proj of its own kind")
        heads, kv_heads = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
        return split_rows(qkv, (heads, kv_heads, kv_heads))
    if all(hasattr(module, f"{part}_proj") for part in "qkv"):
        return [modules.linear(f"{name}.{part}_proj") for part in "qkv"]
    raise UnsupportedStructureError(f"{block.module} has no q_proj, k_proj and v_proj")


def split_rows(projection: Projection, sizes: tuple[int, ...]) -> list[Projection]:
    """A fused projection as its parts, which share its memory."""
    bias = projection.bias
    biases = [None] * len(sizes) if bias is None else list(bias.split(sizes))
    return [Projection(w, b) for w, b in zip(projection.weight.split(sizes), biases, strict=True)]


def _heads(
    module: nn.Module, block: AttentionBlock, query: Projection, key: Projection
) -> tuple[int, tuple[int, ...]]:
    """Width of a head, and the KV head that each query head reads.

    A block whose heads cannot be removed alone does not know them.
    """
    if block.whole is None:
        return block.head_dim, block.kv_of_head
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim < 1:
        raise UnsupportedStructureError(f"{block.module} has no head_dim")
    heads, kv_heads = (len(part.weight) // head_dim for part in (query, key))
    if kv_heads == 0 or heads % kv_heads or heads * head_dim != block.part_width:
        raise UnsupportedStructureError(
            f"{block.module}: {len(query.weight)} rows of q and {len(key.weight)} of k are not "
            f"heads of {head_dim}"
        )
    return head_dim, tuple(kv for kv in range(kv_heads) for _ in range(heads // kv_heads))


def _head_norms(
    modules: LayerModules,
    module: nn.Module,
    name: str,
    block: AttentionBlock,
    head_dim: int,
    kv_of_head: tuple[int, ...],
) -> tuple[Norm | None, Norm | None, bool]:
    """Norms of q and k, and whether they are of all heads together."""
    found = []
    for names in HEAD_NORMS:
        present = [part for part in names if isinstance(getattr(module, part, None), nn.Module)]
        found.append(modules.norm(f"{name}.{present[0]}") if present else None)
    counts = (len(kv_of_head), max(kv_of_head) + 1)
    of_one, of_all = [], []
    for norm, count in zip(found, counts, strict=True):
        if norm is not None and norm.weight is not None:
            of_one.append(norm.weight.shape == (head_dim,))
            of_all.append(norm.weight.shape == (count * head_dim,))
    if all(of_one):
        return found[0], found[1], False
    if not all(of_all) or block.whole is None:
        raise UnsupportedStructureError(
            f"{block.module}: expected norms of q and k over one head each, or heads that are "
            f"removed together only"
        )
    return found[0], found[1], True


def _softcap(module: nn.Module, block: AttentionBlock) -> float | None:
    """A cap is far above most scores: no check on a few tokens sees whether a class applies it."""
    softcap = getattr(module, "attn_logit_softcapping", None)
    if softcap is None:
        return None
    if {each.__name__ for each in type(module).__mro__}.isdisjoint(CAPPED):
        raise UnsupportedStructureError(
            f"{block.module} has attn_logit_softcapping, but {type(module).__name__} is not known "
            f"to apply it"
        )
    return float(softcap)


def _query_growth(module: nn.Module, config: Any) -> QueryGrowth | None:
    """Of long texts only: no check on a few tokens sees it."""
    rope = getattr(config, "rope_parameters", None) or {}
    beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if beta is None or length is None or function_of(type(module), GROWTH_FUNCTION) is None:
        return None
    return QueryGrowth(float(beta), int(length))


def _window(config: Any, module: nn.Module, block: AttentionBlock) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:  # masks are made from these, whatever the module has
        kind = kinds[block.layer]
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedStructureError(
                f"{block.module}: expected full_attention or sliding_attention, got {kind}"
            )
        return int(config.sliding_window) if kind == "sliding_attention" else None
    if hasattr(module, "sliding_window"):
        return cast("int | None", module.sliding_window)
    # a class without the option has a model without windows, whatever config.json says
    return config.sliding_window if hasattr(type(config), "sliding_window") else None
