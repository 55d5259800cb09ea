"""A pruned Qwen3."""

from transformers import Qwen3ForCausalLM, Qwen3Model

from .configuration_bonsai_qwen3 import BonsaiQwen3Config
from .heterogeneous_modeling import HeterogeneousCausalLM, HeterogeneousDecoder, MasksByLayerType


class BonsaiQwen3Model(MasksByLayerType, HeterogeneousDecoder, Qwen3Model):
    """Qwen3Model whose layers have the widths that the configuration gives each of them."""

    config: BonsaiQwen3Config
    config_class = BonsaiQwen3Config


class BonsaiQwen3ForCausalLM(HeterogeneousCausalLM, Qwen3ForCausalLM):
    """Qwen3ForCausalLM on a `BonsaiQwen3Model`."""

    config: BonsaiQwen3Config
    config_class = BonsaiQwen3Config
    decoder_class = BonsaiQwen3Model
