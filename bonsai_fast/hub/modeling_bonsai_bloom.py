"""A pruned BLOOM."""

from transformers import BloomForCausalLM, BloomModel

from .configuration_bonsai_bloom import BonsaiBloomConfig
from .heterogeneous_modeling import (
    HeterogeneousCausalLM,
    HeterogeneousDecoder,
    RemovedAttention,
    RemovedMLP,
)


class RemovedBloomAttention(RemovedAttention):
    """BLOOM's sub-layers add the residual themselves."""

    def forward(self, hidden_states, residual, **kwargs):
        output, weights = super().forward(hidden_states, **kwargs)
        return residual + output, weights


class RemovedBloomMLP(RemovedMLP):
    """BLOOM's sub-layers add the residual themselves."""

    def forward(self, hidden_states, residual):
        return residual + super().forward(hidden_states)


def pick_alibi_heads(attention, args, kwargs):
    """Forward pre-hook: of the slopes of all heads, [B * H, 1, T], keep those of this layer's."""
    alibi = kwargs["alibi"].unflatten(0, (-1, attention.num_dense_heads))
    return args, kwargs | {"alibi": alibi[:, attention.alibi_heads].flatten(0, 1)}


class BonsaiBloomModel(HeterogeneousDecoder, BloomModel):
    """BloomModel whose layers have the widths that the configuration gives each of them."""

    config: BonsaiBloomConfig
    config_class = BonsaiBloomConfig
    layers_path = "h"
    attention_name = "self_attention"
    removed_attention_class = RemovedBloomAttention
    removed_mlp_class = RemovedBloomMLP

    def exclusive_norms(self):
        # with this flag the residual is the norm's output
        if self.config.apply_residual_connection_post_layernorm:
            return None, None
        return super().exclusive_norms()

    def fit_attention(self, attention, shape):
        super().fit_attention(attention, shape)
        if shape.alibi_heads is not None:
            attention.alibi_heads = list(shape.alibi_heads)
            attention.num_dense_heads = self.num_heads
            attention.register_forward_pre_hook(pick_alibi_heads, with_kwargs=True)


class BonsaiBloomForCausalLM(HeterogeneousCausalLM, BloomForCausalLM):
    """BloomForCausalLM on a `BonsaiBloomModel`."""

    config: BonsaiBloomConfig
    config_class = BonsaiBloomConfig
    decoder_class = BonsaiBloomModel
