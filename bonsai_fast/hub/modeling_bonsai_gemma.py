"""A pruned Gemma."""

from transformers import GemmaForCausalLM, GemmaModel

from .configuration_bonsai_gemma import BonsaiGemmaConfig
from .heterogeneous_modeling import HeterogeneousCausalLM, HeterogeneousDecoder


class BonsaiGemmaModel(HeterogeneousDecoder, GemmaModel):
    """GemmaModel whose layers have the widths that the configuration gives each of them."""

    config: BonsaiGemmaConfig
    config_class = BonsaiGemmaConfig


class BonsaiGemmaForCausalLM(HeterogeneousCausalLM, GemmaForCausalLM):
    """GemmaForCausalLM on a `BonsaiGemmaModel`."""

    config: BonsaiGemmaConfig
    config_class = BonsaiGemmaConfig
    decoder_class = BonsaiGemmaModel
