"""A pruned LLaMA."""

from transformers import LlamaForCausalLM, LlamaModel

from .configuration_bonsai_llama import BonsaiLlamaConfig
from .heterogeneous_modeling import HeterogeneousCausalLM, HeterogeneousDecoder


class BonsaiLlamaModel(HeterogeneousDecoder, LlamaModel):
    """LlamaModel whose layers have the widths that the configuration gives each of them."""

    config: BonsaiLlamaConfig
    config_class = BonsaiLlamaConfig


class BonsaiLlamaForCausalLM(HeterogeneousCausalLM, LlamaForCausalLM):
    """LlamaForCausalLM on a `BonsaiLlamaModel`."""

    config: BonsaiLlamaConfig
    config_class = BonsaiLlamaConfig
    decoder_class = BonsaiLlamaModel
