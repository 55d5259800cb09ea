"""Decoders whose layers differ in width, made from stock ones; what all bonsai_* families share.

The stock class builds its layers with the dense widths; then every layer is fitted to its shape:
projections are resized, removed sub-layers are replaced by what is left of them. During loading
all of this happens on the meta device.

This file travels with saved models: it imports nothing but torch, transformers and its siblings.
"""

import torch
from torch import nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .heterogeneous_config import NO_ATTENTION

ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense")
MLP_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h")
# rows of the projections into the MLP, in multiples of its width
MLP_INPUTS = {"gate_proj": 1, "up_proj": 1, "gate_up_proj": 2, "fc1": 1, "dense_h_to_4h": 1}


# What is left of a removed sub-layer
# --------------------------------------------------------------------------------


class RemovedProjection(nn.Module):
    """An output projection without inputs: its bias, or zero."""

    def __init__(self, projection):
        super().__init__()
        self.bias = (
            None if projection.bias is None else nn.Parameter(torch.zeros_like(projection.bias))
        )

    def forward(self, x):
        """x: [..., D], read for its shape alone."""
        return (x.new_zeros(()) if self.bias is None else self.bias).expand_as(x)


class RemovedAttention(nn.Module):
    """A removed attention; what is left keeps the old name of its output projection.

    In a model without any attention, layer 0 keeps a cache slot and fills it with zeros of
    `cache_shape` (heads, head_dim): later calls learn their positions from the cache's length.
    """

    cache_shape = None

    def __init__(self, attention):
        super().__init__()
        self.output = child_among(attention, ATTENTION_OUTPUTS)
        self.add_module(self.output, RemovedProjection(getattr(attention, self.output)))

    def forward(self, hidden_states, *args, past_key_values=None, layer_past=None, **kwargs):
        cache = past_key_values if past_key_values is not None else layer_past
        if self.cache_shape is not None and cache is not None:
            heads, head_dim = self.cache_shape
            batch, length, _ = hidden_states.shape
            zeros = hidden_states.new_zeros(batch, heads, length, head_dim)
            cache.update(zeros, zeros, 0)
        return self.get_submodule(self.output)(hidden_states), None


class RemovedMLP(nn.Module):
    """A removed MLP; what is left keeps the old name of its output projection."""

    def __init__(self, mlp):
        super().__init__()
        self.output = child_among(mlp, MLP_OUTPUTS)
        self.add_module(self.output, RemovedProjection(getattr(mlp, self.output)))

    def forward(self, hidden_states):
        return self.get_submodule(self.output)(hidden_states)


def drop_norm(layer, name):
    """Put nothing in the place of a norm that goes with its sub-layer."""
    if name is not None:
        setattr(layer, name, nn.Identity())


# What is different in a kept sub-layer
# ------------------------------------------------------------------------------


def child_among(module, names):
    """The one child that carries one of these names."""
    return next(name for name in names if name in module._modules)


def resize(module, name, *, rows=None, columns=None):
    """Replace an nn.Linear child by one with other numbers of rows or columns."""
    old = getattr(module, name)
    rows, columns = rows or old.out_features, columns or old.in_features
    if (rows, columns) != (old.out_features, old.in_features):
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        setattr(module, name, nn.Linear(columns, rows, bias=old.bias is not None, **like))


class SharedKVHeads:
    """Stands before an attention's cache and repeats every KV head for its query heads.

    The cache itself keeps one copy. Expanding here serves every attention implementation, since
    they all see as many KV heads as query heads.
    """

    def __init__(self, cache, q_heads_per_kv):
        self.cache = cache
        self.q_heads_per_kv = q_heads_per_kv

    def update(self, key, value, layer_idx, *args, **kwargs):
        """key, value: [B, Hkv, T, K] -> [B, H, T', K]."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer_idx, *args, **kwargs)
        return self._repeat(key), self._repeat(value)

    def _repeat(self, states):
        # slices of python ints: an index tensor made on the meta device would stay there
        heads = (
            states[:, kv : kv + 1].expand(-1, count, -1, -1)
            for kv, count in enumerate(self.q_heads_per_kv)
        )
        return torch.cat(list(heads), dim=1)


def share_kv_heads(attention, args, kwargs):
    """Forward pre-hook of an irregular attention module."""
    return args, kwargs | {
        "past_key_values": SharedKVHeads(kwargs.get("past_key_values"), attention.q_heads_per_kv)
    }


# it spreads K and V over the query heads itself
share_kv_heads.fused_engine_may_skip = True


class LayerConfig:
    """A model's configuration as one layer sees it: all but the layer's widths is read through."""

    def __init__(self, config, **widths):
        self._config = config
        self.__dict__.update(widths)

    def __getattr__(self, name):
        if name == "_config":  # not there yet while this is being copied
            raise AttributeError(name)
        return getattr(self._config, name)


# The models ---------------------------------------------------------------------------------------


class HeterogeneousDecoder:
    """Mixin in front of a stock base model: builds it dense, then fits every layer to its shape."""

    layers_path = "layers"
    attention_name = "self_attn"
    mlp_name = "mlp"  # "" if the projections belong to the layer itself
    removed_attention_class = RemovedAttention
    removed_mlp_class = RemovedMLP

    def __init__(self, config):
        with config.as_dense():
            super().__init__(config)
        shapes = config.layer_shapes()
        no_attention = not any(shape.num_heads for shape in shapes)
        for index, layer in enumerate(self.get_submodule(self.layers_path)):
            shape = shapes[index]
            sizes = {"attention": shape.num_heads, "mlp": shape.channels}
            layer.removed_sublayers = tuple(name for name, size in sizes.items() if not size)
            if shape.num_heads:
                self.fit_attention(getattr(layer, self.attention_name), shape)
            else:
                self.remove_attention(layer, counts_positions=no_attention and index == 0)
            if shape.channels:
                self.fit_mlp(layer, shape.channels)
            else:
                self.remove_mlp(layer)
        if getattr(config, "output_bias", False):
            self.add_output_biases()
        self.post_init()

    def add_output_biases(self):
        """Give output projections that have none a bias of zero; also what is left of them."""
        self.config.output_bias = True
        for layer in self.get_submodule(self.layers_path):
            attention, mlp = getattr(layer, self.attention_name), layer.get_submodule(self.mlp_name)
            for owner, names in ((attention, ATTENTION_OUTPUTS), (mlp, MLP_OUTPUTS)):
                projection = getattr(owner, child_among(owner, names))
                if projection.bias is None:
                    like = next(self.parameters())
                    projection.bias = nn.Parameter(like.new_zeros(self.config.hidden_size))

    def exclusive_norms(self):
        """Names of the norms that only the attention, and only the MLP, reads; or None."""
        return "input_layernorm", "post_attention_layernorm"

    def fit_attention(self, attention, shape):
        """Give an attention module the heads of a `LayerShape`."""
        head_dim = self.config.head_dim
        query, key = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
        rows = {
            "q_proj": query,
            "k_proj": key,
            "v_proj": key,
            "qkv_proj": query + 2 * key,
            "query_key_value": 3 * query,
        }
        for name in rows.keys() & attention._modules.keys():
            resize(attention, name, rows=rows[name])
        resize(attention, child_among(attention, ATTENTION_OUTPUTS), columns=query)
        counts = {
            "num_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "num_key_value_groups": 1 if shape.is_irregular else shape.q_heads_per_kv[0],
        }
        for name in counts.keys() & vars(attention).keys():
            setattr(attention, name, counts[name])
        if shape.is_irregular:
            attention.q_heads_per_kv = list(shape.q_heads_per_kv)
            attention.register_forward_pre_hook(share_kv_heads, with_kwargs=True)

    def fit_mlp(self, layer, channels):
        """Give a layer's MLP this many channels."""
        mlp = layer.get_submodule(self.mlp_name)
        for name in MLP_INPUTS.keys() & mlp._modules.keys():
            resize(mlp, name, rows=MLP_INPUTS[name] * channels)
        resize(mlp, child_among(mlp, MLP_OUTPUTS), columns=channels)

    def remove_attention(self, layer, *, counts_positions):
        """Leave the bias of the attention's output projection, and drop the norm before it."""
        removed = self.removed_attention_class(getattr(layer, self.attention_name))
        if counts_positions:
            first = self.config.per_layer_config[0]
            heads = getattr(first, "num_key_value_heads", None) or first.num_attention_heads
            removed.cache_shape = (heads, first.head_dim)
        setattr(layer, self.attention_name, removed)
        drop_norm(layer, self.exclusive_norms()[0])

    def remove_mlp(self, layer):
        """Leave the bias of the MLP's output projection, and drop the norm before it."""
        setattr(layer, self.mlp_name, self.removed_mlp_class(getattr(layer, self.mlp_name)))
        drop_norm(layer, self.exclusive_norms()[1])


class HeterogeneousCausalLM:
    """Mixin in front of a stock causal language model, on the family's `decoder_class`."""

    decoder_class = None

    def __init__(self, config):
        with config.as_dense():
            super().__init__(config)
        setattr(self, self.base_model_prefix, self.decoder_class(config))
        self.post_init()


class MasksByLayerType:
    """Mixin in front of a base model that looks masks up by layer type (Qwen)."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        layer_types = set(self.config.layer_types)
        one_input = (input_ids is None) != (inputs_embeds is None)
        if NO_ATTENTION in layer_types and one_input and not isinstance(attention_mask, dict):
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.embed_tokens(input_ids)
            use_cache = self.config.use_cache if use_cache is None else use_cache
            if (
                use_cache
                and past_key_values is None
                and not (self.gradient_checkpointing and self.training)
            ):
                past_key_values = DynamicCache(config=self.config)
            arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            attention_mask = {NO_ATTENTION: None}
            if "full_attention" in layer_types:
                attention_mask["full_attention"] = create_causal_mask(**arguments)
            if "sliding_attention" in layer_types:
                attention_mask["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
