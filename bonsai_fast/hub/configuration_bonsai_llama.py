"""Configuration of a pruned LLaMA."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiLlamaConfig(HeterogeneousConfig, LlamaConfig):
    """LlamaConfig whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_llama"

    q_heads_per_kv: list[int] | None = None
    output_bias: bool = False
