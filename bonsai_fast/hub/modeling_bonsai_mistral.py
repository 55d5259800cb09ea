"""A pruned Mistral."""

from transformers import MistralForCausalLM, MistralModel

from .configuration_bonsai_mistral import BonsaiMistralConfig
from .heterogeneous_modeling import HeterogeneousCausalLM, HeterogeneousDecoder


class BonsaiMistralModel(HeterogeneousDecoder, MistralModel):
    """MistralModel whose layers have the widths that the configuration gives each of them."""

    config: BonsaiMistralConfig
    config_class = BonsaiMistralConfig


class BonsaiMistralForCausalLM(HeterogeneousCausalLM, MistralForCausalLM):
    """MistralForCausalLM on a `BonsaiMistralModel`."""

    config: BonsaiMistralConfig
    config_class = BonsaiMistralConfig
    decoder_class = BonsaiMistralModel
