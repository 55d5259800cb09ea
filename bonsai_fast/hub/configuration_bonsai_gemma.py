"""Configuration of a pruned Gemma."""

from huggingface_hub.dataclasses import strict
from transformers import GemmaConfig

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiGemmaConfig(HeterogeneousConfig, GemmaConfig):
    """GemmaConfig whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_gemma"

    q_heads_per_kv: list[int] | None = None
    output_bias: bool = False
