"""Configuration of a pruned GPT-NeoX."""

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoXConfig

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiGPTNeoXConfig(HeterogeneousConfig, GPTNeoXConfig):
    """GPTNeoXConfig whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_gpt_neox"

    head_dim: int | None = None
    q_heads_per_kv: list[int] | None = None
    output_bias: bool = False
