"""Configuration of a pruned BLOOM."""

from huggingface_hub.dataclasses import strict
from transformers import BloomConfig

from .heterogeneous_config import HeterogeneousConfig


@strict
class BonsaiBloomConfig(HeterogeneousConfig, BloomConfig):
    """BloomConfig whose layers may differ in width; see `HeterogeneousConfig`."""

    model_type = "bonsai_bloom"

    head_dim: int | None = None
    intermediate_size: int | None = None
    q_heads_per_kv: list[int] | None = None
    alibi_heads: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)
