"""Configuration of a pruned Qwen2."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiQwen2Config(HeterogeneousConfig, Qwen2Config):
    """Qwen2Config whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_qwen2"

    head_dim: int | None = None
    q_heads_per_kv: list[int] | None = None
    output_bias: bool = False
