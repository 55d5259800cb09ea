"""A pruned Phi-2."""

from transformers import PhiForCausalLM, PhiModel

from .configuration_bonsai_phi import BonsaiPhiConfig
from .heterogeneous_modeling import HeterogeneousCausalLM, HeterogeneousDecoder


class BonsaiPhiModel(HeterogeneousDecoder, PhiModel):
    """PhiModel whose layers have the widths that the configuration gives each of them."""

    config: BonsaiPhiConfig
    config_class = BonsaiPhiConfig

    def exclusive_norms(self):
        return None, None  # attention and MLP run in parallel behind one norm


class BonsaiPhiForCausalLM(HeterogeneousCausalLM, PhiForCausalLM):
    """PhiForCausalLM on a `BonsaiPhiModel`."""

    config: BonsaiPhiConfig
    config_class = BonsaiPhiConfig
    decoder_class = BonsaiPhiModel
