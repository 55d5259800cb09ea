"""Tiny random models, one of every family and variant that surgery or scoring could get wrong.

Odd numbers of heads, K and V shared in groups, tied and untied embeddings, every bias and norm
random: what is not looked at properly shows in the logits. Seeds are fixed; every call returns a
new model in evaluation mode, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIZES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6}


def random_model(model_class: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                centre = 0.0 if config.model_type == "gemma" else 1.0  # gemma's norms add 1
                parameter.copy_(centre + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


def llama() -> PreTrainedModel:
    return random_model(LlamaForCausalLM, LlamaConfig(**COMMON, **SIZES), 1)


def llama3() -> PreTrainedModel:
    """GQA, explicit head_dim, tied, scaled rotary embedding."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 10}
    config = LlamaConfig(**COMMON, **sizes, rope_parameters=rope, tie_word_embeddings=True)
    return random_model(LlamaForCausalLM, config, 2)


def llama_bias() -> PreTrainedModel:
    config = LlamaConfig(
        **COMMON, **SIZES, num_key_value_heads=3, attention_bias=True, mlp_bias=True
    )
    return random_model(LlamaForCausalLM, config, 3)


def mistral() -> PreTrainedModel:
    config = MistralConfig(**COMMON, **SIZES, num_key_value_heads=2, sliding_window=5)
    return random_model(MistralForCausalLM, config, 4)


def qwen2() -> PreTrainedModel:
    """Biases on q, k and v alone; the last layer attends within a window."""
    config = Qwen2Config(
        **COMMON,
        **SIZES,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    )
    return random_model(Qwen2ForCausalLM, config, 5)


def qwen3() -> PreTrainedModel:
    """Norms on q and k; 5 heads of 12 do not add up to the hidden size."""
    sizes = {**SIZES, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12}
    return random_model(
        Qwen3ForCausalLM, Qwen3Config(**COMMON, **sizes, tie_word_embeddings=True), 6
    )


def gemma() -> PreTrainedModel:
    """One KV head for all; tied."""
    sizes = {**SIZES, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}
    return random_model(GemmaForCausalLM, GemmaConfig(**COMMON, **sizes), 7)


def phi3() -> PreTrainedModel:
    config = Phi3Config(**COMMON, **SIZES, num_key_value_heads=3, sliding_window=6)
    return random_model(Phi3ForCausalLM, config, 8)


def phi() -> PreTrainedModel:
    return random_model(PhiForCausalLM, PhiConfig(**COMMON, **SIZES), 9)


def phi_gqa() -> PreTrainedModel:
    config = PhiConfig(**COMMON, **SIZES, num_key_value_heads=2, qk_layernorm=True)
    return random_model(PhiForCausalLM, config, 10)


def _opt(seed: int, **changes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 40, "ffn_dim": 36, "num_attention_heads": 5, "dropout": 0.0}
    return random_model(OPTForCausalLM, OPTConfig(**COMMON, **sizes, **changes), seed)


def opt() -> PreTrainedModel:
    return _opt(11)


def opt_post() -> PreTrainedModel:
    """Like opt-350m: norms behind the residual, embeddings narrower than the layers."""
    return _opt(12, do_layer_norm_before=False, word_embed_proj_dim=24)


def bloom() -> PreTrainedModel:
    config = BloomConfig(**COMMON, hidden_size=48, num_attention_heads=6)
    return random_model(BloomForCausalLM, config, 13)


def bloom_post() -> PreTrainedModel:
    """The residual is the norm's output."""
    config = BloomConfig(
        **COMMON,
        hidden_size=40,
        num_attention_heads=5,
        apply_residual_connection_post_layernorm=True,
    )
    return random_model(BloomForCausalLM, config, 14)


def gpt_neox() -> PreTrainedModel:
    return random_model(GPTNeoXForCausalLM, GPTNeoXConfig(**COMMON, **SIZES), 15)


def gpt_neox_sequential() -> PreTrainedModel:
    config = GPTNeoXConfig(**COMMON, **SIZES, use_parallel_residual=False, attention_bias=False)
    return random_model(GPTNeoXForCausalLM, config, 16)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    build.__name__: build
    for build in (
        llama,
        llama3,
        llama_bias,
        mistral,
        qwen2,
        qwen3,
        gemma,
        phi3,
        phi,
        phi_gqa,
        opt,
        opt_post,
        bloom,
        bloom_post,
        gpt_neox,
        gpt_neox_sequential,
    )
}
