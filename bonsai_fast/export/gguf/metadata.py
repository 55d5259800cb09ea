"""The hyperparameters of a GGUF file, under llama.cpp's names."""

from __future__ import annotations

from typing import Any

from bonsai_fast.checkpoints.saved_model import SavedModel
from bonsai_fast.export.gguf.architecture import GGUFPlan, context_length, rope_of
from bonsai_fast.export.gguf.multipliers import multipliers_of
from bonsai_fast.export.gguf.write import Fields, number, real, text, widths


def hyperparameters(model: SavedModel, plan: GGUFPlan) -> Fields:
    """All entries for a model directory, except the tokenizer's."""
    config: Any = model.config
    rope = rope_of(config)
    epsilon = config.rms_norm_eps * multipliers_of(model.family, config, model.head_dim).epsilon
    fields = {
        "general.type": text("model"),
        "general.name": text(model.directory.resolve().name),
        **layer_fields(plan, model.head_dim),
        "context_length": number(context_length(config)),
        "embedding_length": number(config.hidden_size),
        "vocab_size": number(config.vocab_size),
        "attention.layer_norm_rms_epsilon": real(epsilon),
        "rope.freq_base": real(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        fields["rope.scaling.type"] = text("linear")
        fields["rope.scaling.factor"] = real(rope["factor"])
    return prefixed(fields, plan.architecture.name)


def layer_fields(plan: GGUFPlan, head_dim: int) -> Fields:
    """The entries about layers, without the architecture's prefix.

    Key and value lengths are always given: llama.cpp would derive them from the first layer.
    """
    return {
        "block_count": number(len(plan.layers)),
        "feed_forward_length": widths([layer.channels for layer in plan.layers]),
        "attention.head_count": widths([layer.num_heads for layer in plan.layers]),
        "attention.head_count_kv": widths([layer.num_kv_heads for layer in plan.layers]),
        "attention.key_length": number(head_dim),
        "attention.value_length": number(head_dim),
        "rope.dimension_count": number(head_dim),
    }


def prefixed(fields: Fields, architecture: str) -> Fields:
    """Add the architecture's name to every key that does not start with "general."."""
    return {
        key if key.startswith("general.") else f"{architecture}.{key}": value
        for key, value in fields.items()
    }
