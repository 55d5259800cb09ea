"""A pruned Phi-3."""

from transformers import Phi3ForCausalLM, Phi3Model

from .configuration_bonsai_phi3 import BonsaiPhi3Config
from .heterogeneous_modeling import HeterogeneousCausalLM, HeterogeneousDecoder, LayerConfig


class BonsaiPhi3Model(HeterogeneousDecoder, Phi3Model):
    """Phi3Model whose layers have the widths that the configuration gives each of them."""

    config: BonsaiPhi3Config
    config_class = BonsaiPhi3Config

    def fit_attention(self, attention, shape):
        super().fit_attention(attention, shape)
        # Phi3Attention.forward splits the fused projection by the number of heads in the
        # configuration
        attention.config = LayerConfig(self.config, num_attention_heads=shape.num_heads)


class BonsaiPhi3ForCausalLM(HeterogeneousCausalLM, Phi3ForCausalLM):
    """Phi3ForCausalLM on a `BonsaiPhi3Model`."""

    config: BonsaiPhi3Config
    config_class = BonsaiPhi3Config
    decoder_class = BonsaiPhi3Model
