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

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SIZES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6}


def _build(model_class: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
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
    return _build(LlamaForCausalLM, LlamaConfig(**_COMMON, **_SIZES), 1)


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
    sizes = {**_SIZES, "num_key_value_heads": 2, "head_dim": 10}
    config = LlamaConfig(**_COMMON, **sizes, rope_parameters=rope, tie_word_embeddings=True)
    return _build(LlamaForCausalLM, config, 2)


def llama_bias() -> PreTrainedModel:
    config = LlamaConfig(
        **_COMMON, **_SIZES, num_key_value_heads=3, attention_bias=True, mlp_bias=True
    )
    return _build(LlamaForCausalLM, config, 3)


def mistral() -> PreTrainedModel:
    config = MistralConfig(**_COMMON, **_SIZES, num_key_value_heads=2, sliding_window=5)
    return _build(MistralForCausalLM, config, 4)


def qwen2() -> PreTrainedModel:
    """Biases on q, k and v alone; the last layer attends within a window."""
    config = Qwen2Config(
        **_COMMON,
        **_SIZES,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    )
    return _build(Qwen2ForCausalLM, config, 5)


def qwen3() -> PreTrainedModel:
    """Norms on q and k; 5 heads of 12 do not add up to the hidden size."""
    sizes = {**_SIZES, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12}
    return _build(Qwen3ForCausalLM, Qwen3Config(**_COMMON, **sizes, tie_word_embeddings=True), 6)


def gemma() -> PreTrainedModel:
    """One KV head for all; tied."""
    sizes = {**_SIZES, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}
    return _build(GemmaForCausalLM, GemmaConfig(**_COMMON, **sizes), 7)


def phi3() -> PreTrainedModel:
    config = Phi3Config(**_COMMON, **_SIZES, num_key_value_heads=3, sliding_window=6)
    return _build(Phi3ForCausalLM, config, 8)


def phi() -> PreTrainedModel:
    return _build(PhiForCausalLM, PhiConfig(**_COMMON, **_SIZES), 9)


def phi_gqa() -> PreTrainedModel:
    config = PhiConfig(**_COMMON, **_SIZES, num_key_value_heads=2, qk_layernorm=True)
    return _build(PhiForCausalLM, config, 10)


def _opt(seed: int, **changes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 40, "ffn_dim": 36, "num_attention_heads": 5, "dropout": 0.0}
    return _build(OPTForCausalLM, OPTConfig(**_COMMON, **sizes, **changes), seed)


def opt() -> PreTrainedModel:
    return _opt(11)


def opt_post() -> PreTrainedModel:
    """Like opt-350m: norms behind the residual, embeddings narrower than the layers."""
    return _opt(12, do_layer_norm_before=False, word_embed_proj_dim=24)


def bloom() -> PreTrainedModel:
    config = BloomConfig(**_COMMON, hidden_size=48, num_attention_heads=6)
    return _build(BloomForCausalLM, config, 13)


def bloom_post() -> PreTrainedModel:
    """The residual is the norm's output."""
    config = BloomConfig(
        **_COMMON,
        hidden_size=40,
        num_attention_heads=5,
        apply_residual_connection_post_layernorm=True,
    )
    return _build(BloomForCausalLM, config, 14)


def gpt_neox() -> PreTrainedModel:
    return _build(GPTNeoXForCausalLM, GPTNeoXConfig(**_COMMON, **_SIZES), 15)


def gpt_neox_sequential() -> PreTrainedModel:
    config = GPTNeoXConfig(**_COMMON, **_SIZES, use_parallel_residual=False, attention_bias=False)
    return _build(GPTNeoXForCausalLM, config, 16)


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
