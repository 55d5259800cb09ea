"""Configuration of a pruned Phi-2."""

from huggingface_hub.dataclasses import strict
from transformers import PhiConfig

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiPhiConfig(HeterogeneousConfig, PhiConfig):
    """PhiConfig whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_phi"

    head_dim: int | None = None
    q_heads_per_kv: list[int] | None = None
