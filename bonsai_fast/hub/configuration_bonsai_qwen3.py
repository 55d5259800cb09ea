"""Configuration of a pruned Qwen3."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiQwen3Config(HeterogeneousConfig, Qwen3Config):
    """Qwen3Config whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_qwen3"

    q_heads_per_kv: list[int] | None = None
    output_bias: bool = False
