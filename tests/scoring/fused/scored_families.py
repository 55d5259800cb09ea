"""Tiny random models of the families that the fused engine takes beside those of `families`.

Their layers arrange norms, windows, rotary positions and factors in ways of their own. Windows are
shorter than the tests' text; caps are low enough to matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import VOCABULARY
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]


def randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights, norms about their neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def gemma2(**changes: Any) -> PreTrainedModel:
    """Scores and logits are capped; windows alternate; norms before and behind."""
    config = Gemma2Config(
        **SIZES | {"layer_types": LAYERS, "sliding_window": 5, "query_pre_attn_scalar": 9,
                   "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0} | changes
    )  # fmt: skip
    return randomised(Gemma2ForCausalLM(config), 31)


def gemma3(**changes: Any) -> PreTrainedModel:
    """Layers with and without windows have different angles; norms of q and k."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    }
    config = Gemma3TextConfig(
        **SIZES | {"layer_types": LAYERS, "sliding_window": 5, "query_pre_attn_scalar": 9,
                   "rope_parameters": rope} | changes
    )  # fmt: skip
    return randomised(Gemma3ForCausalLM(config), 32)


def granite(**changes: Any) -> PreTrainedModel:
    """Factors of the embedding, the scores, what is added, and the logits."""
    config = GraniteConfig(
        **SIZES | {"embedding_multiplier": 3.0, "attention_multiplier": 0.3,
                   "residual_multiplier": 0.4, "logits_scaling": 0.6, "attention_bias": True,
                   "mlp_bias": True} | changes
    )  # fmt: skip
    return randomised(GraniteForCausalLM(config), 33)


def smollm3(**changes: Any) -> PreTrainedModel:
    """One layer has no positions, another a window."""
    config = SmolLM3Config(
        **SIZES | {"no_rope_layers": [1, 0, 1], "layer_types": LAYERS, "use_sliding_window": True,
                   "sliding_window": 5} | changes
    )  # fmt: skip
    return randomised(SmolLM3ForCausalLM(config), 34)


def cohere(**changes: Any) -> PreTrainedModel:
    """Attention and MLP in parallel behind one layer norm; columns that are turned alternate."""
    config = CohereConfig(**SIZES | {"logit_scale": 0.7, "attention_bias": True} | changes)
    return randomised(CohereForCausalLM(config), 35)


def cohere2(**changes: Any) -> PreTrainedModel:
    """Layers without a window have no positions."""
    config = Cohere2Config(
        **SIZES
        | {"hidden_size": 96, "logit_scale": 0.7, "layer_types": LAYERS, "sliding_window": 5}
        | changes
    )
    return randomised(Cohere2ForCausalLM(config), 36)


def glm4(**changes: Any) -> PreTrainedModel:
    """Half of each head is turned, in alternating columns; a norm behind each sub-layer."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    config = Glm4Config(**SIZES | {"rope_parameters": rope, "attention_bias": True} | changes)
    return randomised(Glm4ForCausalLM(config), 37)


def ministral3(**changes: Any) -> PreTrainedModel:
    """Queries grow with their position, from the fifth token on."""
    growth = {"llama_4_scaling_beta": 0.7, "original_max_position_embeddings": 4}
    rope = {"rope_type": "default", "rope_theta": 100.0, **growth, **changes}
    config = Ministral3Config(**SIZES | {"rope_parameters": rope})
    return randomised(Ministral3ForCausalLM(config), 38)


def olmo2(**changes: Any) -> PreTrainedModel:
    """Norms behind sub-layers only, and of all heads together: these cannot be removed alone."""
    return randomised(Olmo2ForCausalLM(Olmo2Config(**SIZES | {"head_dim": 8} | changes)), 39)


SCORED_FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    build.__name__: build
    for build in (gemma2, gemma3, granite, smollm3, cohere, cohere2, glm4, ministral3, olmo2)
}
