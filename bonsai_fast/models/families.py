"""What structure alone cannot tell about a family: which norm only one sub-layer reads.

Such a norm is removed with its sub-layer. A model whose type is not listed is scored too. Its norms
then stay when a sub-layer is removed, and it can be saved only where its own configuration can
express the result (see `surgery`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PREFIX = "bonsai_"


@dataclass(frozen=True)
class Norms:
    """Names, inside a decoder layer, of the norms that only one sub-layer reads."""

    attention: str | None = None
    mlp: str | None = None


_PRE_NORM = Norms("input_layernorm", "post_attention_layernorm")


def _opt(config: Any) -> Norms:
    # opt-350m normalises behind the residual: those norms are always read
    return (
        Norms("self_attn_layer_norm", "final_layer_norm")
        if config.do_layer_norm_before
        else Norms()
    )


def _bloom(config: Any) -> Norms:
    return Norms() if config.apply_residual_connection_post_layernorm else _PRE_NORM


FAMILIES: dict[str, Callable[[Any], Norms]] = {
    "llama": lambda _: _PRE_NORM,
    "mistral": lambda _: _PRE_NORM,
    "qwen2": lambda _: _PRE_NORM,
    "qwen3": lambda _: _PRE_NORM,
    "gemma": lambda _: _PRE_NORM,
    "phi3": lambda _: _PRE_NORM,
    "phi": lambda _: Norms(),  # attention and MLP run in parallel behind one norm
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": lambda _: _PRE_NORM,
}


def family_of(model_type: str) -> str:
    """Name of the parent's family: a pruned `bonsai_llama` is a `llama`."""
    return model_type.removeprefix(PREFIX)


def norms_of(config: Any) -> Norms:
    """Norms that go with a removed sub-layer, for a model with this configuration."""
    family = FAMILIES.get(family_of(config.model_type))
    return family(config) if family else Norms()
