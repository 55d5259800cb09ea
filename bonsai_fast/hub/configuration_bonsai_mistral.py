"""Configuration of a pruned Mistral."""

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiMistralConfig(HeterogeneousConfig, MistralConfig):
    """MistralConfig whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_mistral"

    q_heads_per_kv: list[int] | None = None
    output_bias: bool = False
