"""Configuration of a pruned OPT."""

from huggingface_hub.dataclasses import strict
from transformers import OPTConfig

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiOPTConfig(HeterogeneousConfig, OPTConfig):
    """OPTConfig whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_opt"
    channels_attribute = "ffn_dim"

    head_dim: int | None = None
    q_heads_per_kv: list[int] | None = None
    output_bias: bool = False
