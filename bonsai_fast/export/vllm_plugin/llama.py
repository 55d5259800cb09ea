"""vLLM's LLaMA with layers of different widths, sized from `per_layer_config`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index

ONLY_TRANSFORMERS = "runs on vLLM's Transformers backend only (model_impl='transformers')"


class BonsaiDecoderLayer(nn.Module):
    """A layer with LLaMA's attention, MLP, both or neither.

    vLLM passes the residual from layer to layer and adds it in the next norm.
    """

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        index = extract_layer_index(prefix)
        shape = config.layer_shapes()[index]
        if shape.is_irregular:
            raise ValueError(
                f"layer {index}: KV heads serve {list(shape.q_heads_per_kv)} query heads, but vLLM "
                "shares them evenly; prune with --head-layout rectangular"
            )
        # Qwen2 has biases only on q, k and v, and no field for them
        output_bias = bool(getattr(config, "attention_bias", False))
        self.self_attn = self.mlp = None
        if shape.num_heads:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = LlamaAttention(
                config=config,
                hidden_size=config.hidden_size,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                max_position_embeddings=config.max_position_embeddings,
                quant_config=quant_config,
                bias=output_bias or config.model_type == "bonsai_qwen2",
                bias_o_proj=output_bias,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.self_attn",
            )
        if shape.channels:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=shape.channels,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                bias=bool(getattr(config, "mlp_bias", False)),
                prefix=f"{prefix}.mlp",
            )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.self_attn is not None:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            hidden_states, residual = _normed(
                self.post_attention_layernorm, hidden_states, residual
            )
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def _normed(
    norm: RMSNorm, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual and normalise; the first sub-layer of the model starts the residual."""
    if residual is None:
        return norm(hidden_states), hidden_states
    hidden_states, residual = norm(hidden_states, residual)
    return hidden_states, residual


class BonsaiForCausalLM(LlamaForCausalLM):  # type: ignore[misc]  # unknown to mypy
    """vLLM's LlamaForCausalLM on layers of different widths."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if not any(shape.num_heads for shape in config.layer_shapes()):
            raise ValueError("vLLM cannot run a model without any attention")
        if getattr(config, "output_bias", False):
            raise ValueError(f"a model with biases of its own {ONLY_TRANSFORMERS}")
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            _check_nothing_removed(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=BonsaiDecoderLayer)


def _check_nothing_removed(config: Any) -> None:
    """Refuse removed sub-layers: the bias of their output projection would have no place."""
    for index, shape in enumerate(config.layer_shapes()):
        if not (shape.num_heads and shape.channels):
            raise ValueError(
                f"layer {index}: what is left of a removed sub-layer with biases "
                f"{ONLY_TRANSFORMERS}"
            )
