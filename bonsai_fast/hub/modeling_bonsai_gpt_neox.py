"""A pruned GPT-NeoX."""

from transformers import GPTNeoXForCausalLM, GPTNeoXModel

from .configuration_bonsai_gpt_neox import BonsaiGPTNeoXConfig
from .heterogeneous_modeling import HeterogeneousCausalLM, HeterogeneousDecoder


class BonsaiGPTNeoXModel(HeterogeneousDecoder, GPTNeoXModel):
    """GPTNeoXModel whose layers have the widths that the configuration gives each of them."""

    config: BonsaiGPTNeoXConfig
    config_class = BonsaiGPTNeoXConfig
    attention_name = "attention"


class BonsaiGPTNeoXForCausalLM(HeterogeneousCausalLM, GPTNeoXForCausalLM):
    """GPTNeoXForCausalLM on a `BonsaiGPTNeoXModel`."""

    config: BonsaiGPTNeoXConfig
    config_class = BonsaiGPTNeoXConfig
    decoder_class = BonsaiGPTNeoXModel
