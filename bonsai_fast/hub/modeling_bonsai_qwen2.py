"""A pruned Qwen2."""

from transformers import Qwen2ForCausalLM, Qwen2Model

from .configuration_bonsai_qwen2 import BonsaiQwen2Config
from .heterogeneous_modeling import HeterogeneousCausalLM, HeterogeneousDecoder, MasksByLayerType


class BonsaiQwen2Model(MasksByLayerType, HeterogeneousDecoder, Qwen2Model):
    """Qwen2Model whose layers have the widths that the configuration gives each of them."""

    config: BonsaiQwen2Config
    config_class = BonsaiQwen2Config


class BonsaiQwen2ForCausalLM(HeterogeneousCausalLM, Qwen2ForCausalLM):
    """Qwen2ForCausalLM on a `BonsaiQwen2Model`."""

    config: BonsaiQwen2Config
    config_class = BonsaiQwen2Config
    decoder_class = BonsaiQwen2Model
