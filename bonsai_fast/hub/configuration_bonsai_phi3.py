"""Configuration of a pruned Phi-3."""

from huggingface_hub.dataclasses import strict
from transformers import Phi3Config

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiPhi3Config(HeterogeneousConfig, Phi3Config):
    """Phi3Config whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_phi3"

    head_dim: int | None = None
    q_heads_per_kv: list[int] | None = None
    output_bias: bool = False
