"""A pruned OPT."""

from torch import nn
from transformers import OPTForCausalLM, OPTModel

from .configuration_bonsai_opt import BonsaiOPTConfig
from .heterogeneous_modeling import (
    HeterogeneousCausalLM,
    HeterogeneousDecoder,
    RemovedProjection,
    drop_norm,
)


class BonsaiOPTModel(HeterogeneousDecoder, OPTModel):
    """OPTModel whose layers have the widths that the configuration gives each of them."""

    config: BonsaiOPTConfig
    config_class = BonsaiOPTConfig
    layers_path = "decoder.layers"
    mlp_name = ""  # fc1 and fc2 belong to the layer itself

    def exclusive_norms(self):
        # opt-350m normalises after the residual is added: those norms are read all the same
        if not self.config.do_layer_norm_before:
            return None, None
        return "self_attn_layer_norm", "final_layer_norm"

    def remove_mlp(self, layer):
        layer.fc1 = nn.Identity()
        layer.fc2 = RemovedProjection(layer.fc2)
        drop_norm(layer, self.exclusive_norms()[1])


class BonsaiOPTForCausalLM(HeterogeneousCausalLM, OPTForCausalLM):
    """OPTForCausalLM on a `BonsaiOPTModel`."""

    config: BonsaiOPTConfig
    config_class = BonsaiOPTConfig
    decoder_class = BonsaiOPTModel
