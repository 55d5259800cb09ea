"""A tiny random model of every causal language model class that transformers registers.

Sizes of the default configuration are replaced by small ones, by the names of its fields, in nested
configurations too. Of fields with one entry a layer, those layers are taken that differ. `CHANGES`
has what this rule cannot know. Weights are large enough that every unit and norm matters, and norms
and biases are away from 1 and 0.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# class -> the model types that it serves, the shortest name first
CLASSES: dict[str, list[str]] = {}
for _type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, key=lambda name: (len(name), name)):
    CLASSES.setdefault(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_type], []).append(_type)
TYPES = tuple(sorted(types[0] for types in CLASSES.values()))
VOCABULARY = 97
LAYERS = 3
POSITIONS = 64

_NAMES: dict[int, tuple[str, ...]] = {
    VOCABULARY: (
        *("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"),
        *("shape_vocab_size", "pronunciation_vocab_size", "unpadded_vocab_size"),
        *("encoder_hash_byte_group_vocab",),
    ),
    POSITIONS: (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
        *("model_max_length", "max_source_positions", "max_target_positions"),
    ),
    48: (
        *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim"),
        *("embedding_size", "input_embedding_size", "output_embedding_size", "lru_width"),
        *("backbone_hidden_size",),
    ),
    40: (
        *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"),
        *("ffn_hidden_size", "dim_ff", "dff", "d_inner", "feed_forward_size"),
        *("intermediate_size_mlp", "dense_intermediate_size"),
    ),
    24: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
        *("shared_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("shared_experts_intermediate_size",),
    ),
    16: (
        *("head_dim", "dim_head", "d_head", "attention_head_size", "swa_head_dim", "kv_channels"),
        *("v_head_dim", "qk_nope_head_dim", "index_head_dim", "kv_lora_rank", "q_lora_rank"),
        *("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "state_size"),
        *("mamba_d_state", "ssm_state_size", "mamba_d_head", "mamba_head_dim", "chunk_size"),
        *("mamba_chunk_size", "router_hidden_size", "hidden_size_per_layer_input", "o_lora_rank"),
        *("sub_layer_rank", "adapter_rank", "laurel_rank", "prompt_mid_dim", "d_rel"),
    ),
    8: ("qk_rope_head_dim", "rotary_dim", "block_size", "mamba_dt_rank", "hc_lowrank"),
    6: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
        *("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"),
        *("num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"),
    ),
    2: (
        *("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"),
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "n_group"),
        *("num_expert_group", "topk_group", "zero_expert_num"),
        *("linear_num_key_heads", "index_n_heads"),
    ),
    1: ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "n_shared_experts"),
    4: (
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "index_topk"),
    ),
    LAYERS: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
        *("num_decoder_layers", "num_blocks", "encoder_layers", "num_encoder_layers"),
    ),
    # shorter than the texts of tests, so that a window matters
    7: (
        *("sliding_window", "sliding_window_size", "attention_window_size", "window_size"),
        *("local_attention", "local_attention_window_len", "attention_chunk_size"),
    ),
}
SMALL = {name: size for size, names in _NAMES.items() for name in names}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True}
# set even where the default is None, which these names do not explain
ALWAYS = ("head_dim", "n_routed_experts", "num_experts_per_tok", "num_key_value_heads")

_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_WINDOW_AND_FULL = ["sliding_attention", "full_attention", "full_attention"]
# kv_lora_rank: keys and values are made from one latent vector
_LATENT: dict[str, Any] = {"num_key_value_heads": 6, "head_dim": 8}
_GEMMA4: dict[str, Any] = {"global_head_dim": 24, "layer_types": _WINDOW_AND_FULL}
# they read K and V of another model in all layers
_ASSISTANT: dict[str, Any] = {
    "model_type": "gemma4_text",
    "num_kv_shared_layers": LAYERS,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 6, "attn_layer_indices": [1]},
    "blt": {
        "num_hidden_layers": LAYERS,
        "encoder_config": {"hidden_size_global": 48},
        "decoder_config": {"hidden_size_global": 48},
    },
    "codegen": {"n_head": 8, "rotary_dim": 4},  # heads are stored in four blocks
    "cohere_compass_text": {
        "layer_types": _WINDOW_AND_FULL,
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "dots3_note_text": {
        f"swa_{name}": size
        for name, size in {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "head_dim": 24,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        }.items()
    },
    "falcon_h1": {"mamba_n_heads": 6, "mamba_d_ssm": 96},
    "gemma3n_text": {
        "num_hidden_layers": LAYERS,
        "intermediate_size": 40,
        "layer_types": _WINDOW_AND_FULL,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0],
        "num_kv_shared_layers": 1,
    },
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_assistant": {
        "text_config": _ASSISTANT | {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 1}
    },
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 6, "layer_types": ["mamba", "attention", "mamba"]},
    "helium": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"n_groups": 2},
    "mimo_v2_flash": {"num_key_value_heads": 1, "head_dim": 24},
    "nemotron_h": {"mamba_num_heads": 6, "n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (24, 24)},
    "xlnet": {"d_head": 8},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# what a configuration class refuses, set behind its back: a vision tower that needs no package of
# its own; a number of layers without K and V of their own with which the class can be built
UNCHECKED: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3n": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "rms_norm_eps": 1e-6,
            "vocab_size": 8,
            "vocab_offset": VOCABULARY,
        }
    },
    "gemma4_assistant": {"text_config": _ASSISTANT | {"num_kv_shared_layers": 1}},
}
# inner configurations are small by their own changes
CHANGES |= {
    "dots3_note": CHANGES["dots3_note_text"],
    "gemma3n": {"text_config": CHANGES["gemma3n_text"]},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified": {
        "text_config": _GEMMA4,
        "vision_config": {"mm_embed_dim": 48, "mm_posemb_size": 16, "output_proj_dims": 48},
    },
    "qwen4_exp": CHANGES["qwen4_exp_text"],
}


# what a class also computes, where its default configuration does not
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere, q and k normalised": ("cohere", {"use_qk_norm": True}),
    "falcon, ALiBi": (
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon, groups": ("falcon", {"new_decoder_architecture": True}),
    "gpt_bigcode, own KV heads": ("gpt_bigcode", {"multi_query": False}),
    "persimmon, no norms of q and k": ("persimmon", {"qk_layernorm": False}),
    "stablelm, parallel": (
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    ),
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The small configuration of a model type, as its class takes it."""
    own = CHANGES.get(model_type, {})
    return _small(model_class(model_type).config_class, own | changes)


def model_class(model_type: str) -> Any:
    """The class that transformers registers."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A new random model in evaluation mode, float32, on the CPU."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    model: PreTrainedModel = model_class(model_type)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # norms, biases, scalars and decay rates keep the middle that they start with
            is_vector = parameter.dim() < 2 or "A_log" in name or not bool(parameter.std() > 0)
            parameter.copy_(parameter + 0.3 * noise if is_vector else 0.2 * noise)
        stored = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def _small(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    known = set(config_class.__dataclass_fields__)
    try:
        default: dict[str, Any] = dict(vars(config_class()))
    except (ValueError, StrictDataclassError):
        default = dict.fromkeys(known, 1)  # not every class has a valid default
    default |= {name: default.get(stored) for name, stored in config_class.attribute_map.items()}
    values = {
        name: size
        for name, size in (SMALL | TOKENS).items()
        if name in known and (name in ALWAYS or default.get(name) is not None)
    }
    if "kv_lora_rank" in known:
        values |= {name: size for name, size in _LATENT.items() if name in known}
    values |= _layers_that_differ(default, known)
    for name, sub_class in config_class.sub_configs.items():
        values[name] = _inner(default.get(name), sub_class, changes.get(name, {}))
    nested = set(config_class.sub_configs)
    given = {x: v for x, v in changes.items() if x not in nested or not isinstance(v, dict)}
    config = config_class(**(values | given))
    for name, inner in UNCHECKED.get(config_class.model_type, {}).items():
        vars(config)[name] = _inner(None, PreTrainedConfig, inner)
    return config


def _inner(default: Any, named: type[PreTrainedConfig], changes: dict[str, Any]) -> Any:
    """A nested configuration; of the class that the changes, the default or the outer class say."""
    chosen = type(default) if isinstance(default, PreTrainedConfig) else named
    if "model_type" in changes:
        chosen = CONFIG_MAPPING[changes["model_type"]]
    return _small(chosen, {x: v for x, v in changes.items() if x != "model_type"})


def _layers_that_differ(default: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Fields with an entry a layer, cut down to layers of which all kinds are present."""
    layers = next((name for name in _NAMES[LAYERS] if default.get(name)), None)
    if layers is None:
        return {}
    lists = {
        name: value
        for name, value in default.items()
        if isinstance(value, (list, tuple)) and name in known and len(value) == default[layers] > 1
    }
    if not lists:
        return {}
    first: dict[str, int] = {}
    for index, row in enumerate(zip(*lists.values(), strict=True)):
        first.setdefault(str(row), index)
    chosen = sorted(first.values())[: 2 * LAYERS]
    chosen += [chosen[-1]] * (LAYERS - len(chosen))
    return {layers: len(chosen)} | {
        name: [value[index] for index in chosen] for name, value in lists.items()
    }
