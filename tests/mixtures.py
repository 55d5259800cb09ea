"""Tiny random mixtures of experts, one of every way to route, and the naive removal of experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


def _build(model_class: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            is_norm = tensor.dim() == 1 and name.endswith("weight")
            tensor.copy_(1 + 0.3 * noise if is_norm else 0.25 * noise)
            if "gate.weight" in name or "router.weight" in name:
                tensor.mul_(3)  # far apart: the choice does not hang on rounding
    return model


def mixtral() -> PreTrainedModel:
    return _build(MixtralForCausalLM, MixtralConfig(**_COMMON, num_local_experts=5), 1)


def qwen3_moe() -> PreTrainedModel:
    """The first layer is dense."""
    config = Qwen3MoeConfig(
        **_COMMON,
        head_dim=8,
        num_experts=6,
        moe_intermediate_size=12,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    )
    return _build(Qwen3MoeForCausalLM, config, 2)


def qwen2_moe() -> PreTrainedModel:
    """A shared expert behind a gate of its own; weights are not renormalised."""
    config = Qwen2MoeConfig(
        **_COMMON,
        num_experts=6,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
        norm_topk_prob=False,
    )
    return _build(Qwen2MoeForCausalLM, config, 3)


def olmoe() -> PreTrainedModel:
    return _build(OlmoeForCausalLM, OlmoeConfig(**_COMMON, num_experts=7), 4)


def granitemoe() -> PreTrainedModel:
    """Softmax over the chosen logits."""
    return _build(GraniteMoeForCausalLM, GraniteMoeConfig(**_COMMON, num_local_experts=5), 5)


def gpt_oss() -> PreTrainedModel:
    """Biases everywhere, transposed and interleaved weights, sinks; the MLP returns a tuple."""
    config = GptOssConfig(**_COMMON, head_dim=8, num_local_experts=5, sliding_window=5)
    return _build(GptOssForCausalLM, config, 6)


def deepseek_v2() -> PreTrainedModel:
    config = DeepseekV2Config(**_DEEPSEEK, topk_method="greedy", routed_scaling_factor=1.5)
    return _build(DeepseekV2ForCausalLM, config, 7)


def deepseek_v3() -> PreTrainedModel:
    """Sigmoids, and a bias that corrects the choice alone; the router needs two experts."""
    config = DeepseekV3Config(**_DEEPSEEK, n_group=1, topk_group=1)
    return _build(DeepseekV3ForCausalLM, config, 8)


def glm4_moe() -> PreTrainedModel:
    config = Glm4MoeConfig(
        **_COMMON,
        head_dim=8,
        moe_intermediate_size=12,
        n_routed_experts=6,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
    )
    return _build(Glm4MoeForCausalLM, config, 9)


def minimax_m2() -> PreTrainedModel:
    """The bias that corrects the choice belongs to the mixture, which passes it to the router."""
    config = MiniMaxM2Config(**_COMMON, head_dim=8, num_local_experts=6)
    return _build(MiniMaxM2ForCausalLM, config, 10)


MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    build.__name__: build
    for build in (
        mixtral,
        qwen3_moe,
        qwen2_moe,
        olmoe,
        granitemoe,
        gpt_oss,
        deepseek_v2,
        deepseek_v3,
        glm4_moe,
        minimax_m2,
    )
}


def without_channels(
    model: PreTrainedModel, kept: Mapping[str, list[int]], returns_tuple: bool = False
) -> PreTrainedModel:
    """The same for channels inside the experts of each mixture."""
    smaller = copy.deepcopy(model)
    smaller.config._experts_implementation = "eager"  # it takes any width
    for path, channels in kept.items():
        owner, _, name = path.rpartition(".")
        if not channels:
            setattr(smaller.get_submodule(owner), name, Nothing(returns_tuple))
            continue
        experts = smaller.get_submodule(path).experts
        if experts.is_transposed:  # gpt-oss: [E, D, 2I], gate and up in turns
            both = [2 * channel + half for channel in channels for half in (0, 1)]
            experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[..., both])
            experts.gate_up_proj_bias = nn.Parameter(experts.gate_up_proj_bias[:, both])
            experts.down_proj = nn.Parameter(experts.down_proj[:, channels])
            continue
        width = experts.down_proj.shape[2]
        both = [*channels, *(width + channel for channel in channels)]
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:, both])
        experts.down_proj = nn.Parameter(experts.down_proj[..., channels])
    return smaller


# the three ways to store and gate experts, with and without shared ones
STORED_DIFFERENTLY = ("mixtral", "gpt_oss", "glm4_moe")


class Nothing(nn.Module):
    """In the place of a mixture that is removed as a whole."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, states: torch.Tensor) -> Any:
        zeros = torch.zeros_like(states)
        return (zeros, None) if self.returns_tuple else zeros


def without_experts(
    model: PreTrainedModel, kept: Mapping[str, list[int]], returns_tuple: bool = False
) -> PreTrainedModel:
    """A copy whose mixtures have these experts alone, cut by hand.

    Args:
        model: one of the above.
        kept: path of each mixture -> its kept experts; none: the mixture gives zeros.
        returns_tuple: whether the mixture returns more than hidden states.
    """
    smaller = copy.deepcopy(model)
    for path, experts in kept.items():
        owner, _, name = path.rpartition(".")
        if not experts:
            setattr(smaller.get_submodule(owner), name, Nothing(returns_tuple))
            continue
        mixture = smaller.get_submodule(path)
        router = getattr(mixture, "gate", None) or mixture.router
        for module in (router, mixture.experts):
            for key, tensor in list(module.named_parameters()):
                setattr(module, key, nn.Parameter(tensor[experts]))
            for key, tensor in list(module.named_buffers()):
                setattr(module, key, tensor[experts])
            module.num_experts = len(experts)
        for key, tensor in list(mixture.named_buffers(recurse=False)):
            setattr(mixture, key, tensor[experts])
        router.top_k = min(router.top_k, len(experts))
    return smaller
