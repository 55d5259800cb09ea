"""Choose the llama.cpp architecture that runs a model, or say why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bonsai_fast.checkpoints.saved_model import SavedModel
from bonsai_fast.export.gguf.plan import GGUFLayer, is_uniform, plan_layers
from bonsai_fast.hub import LayerShape

# Families whose blocks llama.cpp computes with layers of different widths.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "ernie4_5", "helium", "seed_oss",
)  # fmt: skip
# transformers rotates neighbours (2i, 2i+1) in these families, too
ROTATES_PAIRS = ("ernie4_5", "helium")
ROPE_TYPES = ("default", "llama3", "linear")


@dataclass(frozen=True)
class Architecture:
    """What must be known of a llama.cpp architecture to write files for it.

    Attributes:
        name: value of `general.architecture`.
        rotates_pairs: the rotary embedding rotates neighbours (2i, 2i+1), not (i, i + K/2) as in
            transformers; rows of q and k are stored in that order.
        fuses_qkv: q, k and v are one tensor.
        can_skip_attention: layers may have no attention.
        has_rope_factors: it reads the factors of LLaMA 3's rotary embedding.
    """

    name: str
    rotates_pairs: bool = False
    fuses_qkv: bool = False
    can_skip_attention: bool = False
    has_rope_factors: bool = True


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", rotates_pairs=True),
        Architecture("deci", rotates_pairs=True, can_skip_attention=True),
        Architecture("qwen2", has_rope_factors=False),
        Architecture("qwen3", has_rope_factors=False),
        Architecture("openelm", fuses_qkv=True, has_rope_factors=False),
    )
}


@dataclass(frozen=True)
class GGUFPlan:
    """An architecture and its layers.

    Attributes:
        notes: limits of the file, for people.
    """

    architecture: Architecture
    layers: tuple[GGUFLayer, ...]
    notes: tuple[str, ...] = ()


def plan_gguf(model: SavedModel, *, pad_channels_to: int = 32) -> GGUFPlan:
    """Choose the architecture for a saved model, and plan every layer.

    Raises:
        ValueError: llama.cpp cannot run the model; the message says why.
    """
    check_model(model)
    plan = choose(
        model.shapes,
        family=model.family,
        is_tied=model.is_tied,
        keeps_biases=model.has_output_biases,
        pad_channels_to=pad_channels_to,
    )
    rope_type = rope_of(model.config)["rope_type"]
    if rope_type == "llama3" and not plan.architecture.has_rope_factors:
        raise ValueError(
            f"llama.cpp's architecture {plan.architecture.name} has no factors for the rotary "
            "embedding, which this model scales by 'llama3'"
        )
    return GGUFPlan(plan.architecture, plan.layers, (*plan.notes, *_window_notes(model.config)))


def choose(
    shapes: Sequence[LayerShape],
    *,
    family: str,
    is_tied: bool,
    keeps_biases: bool,
    pad_channels_to: int,
) -> GGUFPlan:
    """Choose the architecture by the shapes of the layers.

    Raises:
        ValueError: no architecture has such layers.
    """
    normalised = family == "qwen3"
    own = family if family in ARCHITECTURES else "llama"
    wide = ARCHITECTURES["openelm" if normalised else "deci"]
    layers = plan_layers(
        shapes,
        pad_channels_to=pad_channels_to,
        can_skip_attention=wide.can_skip_attention,
        keeps_biases=keeps_biases,
    )
    if normalised and keeps_biases:
        raise ValueError("llama.cpp has no biases where q and k are normalised")
    if is_uniform(layers) and (own == "llama" or not keeps_biases):
        return GGUFPlan(ARCHITECTURES[own], layers, _dropped(shapes, layers))
    if normalised and not is_tied:
        raise ValueError(
            "llama.cpp has no architecture for layers of different widths with normalised q and k "
            "and an LM head of its own; prune with --uniform, or use transformers or vLLM"
        )
    return GGUFPlan(wide, layers, _dropped(shapes, layers))


def check_model(model: SavedModel) -> None:
    """Refuse models that no architecture computes, whatever their widths.

    Raises:
        ValueError: for the family, its activation, its rotary embedding or its biases.
    """
    config: Any = model.config
    if model.family not in FAMILIES:
        if model.is_stock:
            raise ValueError(
                f"model type {config.model_type!r} is a stock class of transformers: convert it "
                "with llama.cpp's own convert_hf_to_gguf.py"
            )
        raise ValueError(
            f"llama.cpp has no architecture for a {model.family} with layers of different widths, "
            f"only for {', '.join(FAMILIES)}; use --format padded, or prune with --uniform, and "
            "then llama.cpp's own converter"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"llama.cpp computes these blocks with silu, got {config.hidden_act!r}")
    if model.family == "qwen3" and config.attention_bias:
        raise ValueError("llama.cpp has no biases where q and k are normalised")
    rope = rope_of(config)
    if rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(
            "llama.cpp's block for this model rotates whole heads, the model only part of them"
        )
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"rotary embeddings of type {rope['rope_type']!r} are not exported to GGUF; "
            f"expected one of {', '.join(ROPE_TYPES)}"
        )


def rope_of(config: Any) -> dict[str, Any]:
    """Parameters of the rotary embedding; always with `rope_type` and `rope_theta`."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", "rope_theta": 10000.0, **parameters}


def context_length(config: Any) -> int:
    """Number of tokens up to which the file computes the same as the model."""
    return min(int(config.max_position_embeddings), _window(config) or 1 << 62)


def _window(config: Any) -> int | None:
    """Width of the sliding window in tokens; None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    types = getattr(config, "layer_types", None)
    return int(window) if types is None or "sliding_attention" in types else None


def _window_notes(config: Any) -> tuple[str, ...]:
    window = _window(config)
    if window is None or window >= config.max_position_embeddings:
        return ()
    return (
        f"the model attends within a window of {window} tokens, llama.cpp to all tokens: the "
        f"context is limited to {window} tokens, where both are the same",
    )


def _dropped(shapes: Sequence[LayerShape], layers: Sequence[GGUFLayer]) -> tuple[str, ...]:
    removed = sorted(set(range(len(shapes))) - {layer.source for layer in layers})
    return (f"layers {removed} keep nothing and are left out",) if removed else ()
