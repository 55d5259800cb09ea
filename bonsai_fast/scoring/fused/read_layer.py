"""Reads what a decoder layer computes: which norms belong where, and its two sub-layers.

The same name is before the MLP in LLaMA and behind attention in Gemma 2, so a layer's norms are
recognised together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from bonsai_fast.models import AttentionBlock, MLPBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused.layer_modules import LayerModules
from bonsai_fast.scoring.fused.parent import (
    Norm,
    Removed,
    SubLayer,
    UnsupportedStructureError,
)
from bonsai_fast.scoring.fused.read_attention import read_attention
from bonsai_fast.scoring.fused.read_mlp import read_mlp


class _Norms(NamedTuple):
    """Names of a layer's norms; None: there is none at this place.

    Attributes:
        attention, mlp: before a sub-layer.
        post_attention, post_mlp: behind it.
    """

    attention: str | None
    post_attention: str | None
    mlp: str | None
    post_mlp: str | None

    @property
    def parallel(self) -> bool:
        """Whether both sub-layers read the same norm, and so the same states."""
        return self.attention is not None and self.attention == self.mlp


ARRANGEMENTS = (
    # LLaMA
    _Norms("input_layernorm", None, "post_attention_layernorm", None),
    # Gemma 2
    _Norms(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    # OLMo 2
    _Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    # GLM-4
    _Norms(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    # Apertus
    _Norms("attention_layernorm", None, "feedforward_layernorm", None),
    # HyperCLOVA X
    _Norms("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    # VaultGemma
    _Norms("input_layernorm", None, "pre_feedforward_layernorm", None),
    # Cohere
    _Norms("input_layernorm", None, "input_layernorm", None),
)


class LayerParts(NamedTuple):
    """The sub-layers of a layer.

    Attributes:
        attention, mlp: the sub-layers.
        parallel: whether the MLP reads what attention reads.
    """

    attention: SubLayer
    mlp: SubLayer
    parallel: bool


def read_layer(
    layer: nn.Module, layout: Layout, index: int, config: Any, *, rotary_kinds: bool
) -> LayerParts:
    """Describe a decoder layer.

    Args:
        layer: the layer.
        layout: the units.
        index: of the layer.
        config: of the model.
        rotary_kinds: see `Structure`.
    Raises:
        UnsupportedStructureError: something in it is unknown.
    """
    decoder = layout.decoder
    modules = LayerModules(layer, f"{decoder.path}.{index}")
    attention, mlp = decoder.attention.get(index), decoder.mlp.get(index)
    if index in decoder.experts:
        raise UnsupportedStructureError(f"{modules.path} is a mixture of experts")
    names = _arrangement(modules, attention, mlp)
    present = modules.norms()

    def norm(name: str | None) -> Norm | None:
        return modules.norm(name) if name is not None and name in present else None

    factor = float(getattr(layer, "residual_multiplier", 1.0))
    found_attention: SubLayer
    found_mlp: SubLayer
    if attention is None:
        norm(names.attention)  # perhaps it was left, but nothing reads it
        bias = modules.left_bias("self_attn")
        found_attention = Removed(bias, norm(names.post_attention), factor)
    else:
        found_attention = read_attention(
            modules,
            attention,
            config,
            norm=norm(names.attention),
            post_norm=norm(names.post_attention),
            residual_factor=factor,
            rotary_kinds=rotary_kinds,
        )
    if mlp is None:
        norm(names.mlp)
        found_mlp = Removed(modules.left_bias("mlp"), norm(names.post_mlp), factor)
    else:
        found_mlp = read_mlp(
            modules,
            mlp,
            norm=norm(names.mlp),
            post_norm=norm(names.post_mlp),
            residual_factor=factor,
        )
    modules.check_all_seen()
    return LayerParts(found_attention, found_mlp, names.parallel)


def _arrangement(
    modules: LayerModules, attention: AttentionBlock | None, mlp: MLPBlock | None
) -> _Norms:
    """The arrangement that has all norms of a layer. Those of a removed sub-layer may be gone."""
    found = modules.norms()
    for names in ARRANGEMENTS:
        needed: set[str | None] = set()
        if attention is not None:
            needed |= {names.attention, names.post_attention}
        if mlp is not None:
            needed |= {names.mlp, names.post_mlp}
        if needed - {None} <= found <= set(names):
            return names
    listed = ", ".join(sorted(found)) or "none"
    raise UnsupportedStructureError(f"{modules.path} has norms in an unknown arrangement: {listed}")
