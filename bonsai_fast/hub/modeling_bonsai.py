"""Pruned decoders of any family: their layers differ in width. Made from stock classes.

The stock class builds its layers with the dense widths; then every layer is fitted to its shape:
parameters are narrowed, removed sub-layers are replaced by what is left of them. During loading all
of this happens on the meta device.

`BonsaiLlamaForCausalLM` and its like are made from the stock class when they are asked for: see
`__getattr__` at the end. This file travels with saved models.
"""

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_bonsai import (
    AUTO_CLASSES,
    PREFIX,
    bonsai_config,
    pruned_config,
)

# what the sizes of a sub-layer depend on
PARTS = ("heads", "kv_heads", "channels", "experts", "expert_channels")

# What is left of a removed sub-layer -------------------------------------------------------------


class RemovedProjection(nn.Module):
    """An output projection without inputs: its bias, or zero."""

    def __init__(self, projection):
        super().__init__()
        bias = getattr(projection, "bias", None)
        self.width = len(bias) if bias is not None else projection.out_features
        self.bias = None if bias is None else nn.Parameter(torch.zeros_like(bias))

    def forward(self, x):
        """x: [..., D], read for its shape alone. Returns [..., width]."""
        left = x.new_zeros(*x.shape[:-1], self.width)  # not a view: Falcon adds into it
        return left if self.bias is None else left + self.bias


class RemovedNorm(nn.Module):
    """In the place of a norm that is removed with its sub-layer."""

    def __init__(self):
        super().__init__()
        # Nemotron-H asks for its dtype; never on the meta device, from which nothing can be moved
        self.weight = torch.empty(0, device="cpu")

    def _apply(self, fn, recurse=True):
        self.weight = fn(torch.empty(0, dtype=self.weight.dtype, device="cpu"))
        return super()._apply(fn, recurse)

    def forward(self, x, *args, **kwargs):
        return x


class RemovedSublayer(nn.Module):
    """A removed sub-layer; what is left keeps the old name of its output projection.

    It is called as the sub-layer was, and returns as much. In a model without any attention one
    layer keeps a cache slot and fills it with zeros of `cache_shape` (layer, heads, head_dim):
    later calls learn their positions from the cache's length.
    """

    cache_shape = None

    def __init__(self, module, output, returns):
        super().__init__()
        self.parameter_names = list(inspect.signature(module.forward).parameters)
        self.output, self.returns = output, returns
        if output is None:
            return
        *path, name = output.split(".")
        owner = self
        for part in path:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(name, RemovedProjection(module.get_submodule(output)))

    def forward(self, *args, **kwargs):
        names = self.parameter_names
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden_states = given.get("hidden_states", given.get(names[0]))
        cache = given.get("past_key_values", given.get("layer_past"))
        if self.cache_shape is not None and cache is not None:
            layer, heads, head_dim = self.cache_shape
            batch, length = hidden_states.shape[:2]
            zeros = hidden_states.new_zeros(batch, heads, length, head_dim)
            cache.update(zeros, zeros, layer)
        left = torch.zeros_like(hidden_states)
        if self.output is not None:
            left = self.get_submodule(self.output)(hidden_states)
        if "residual" in names:  # BLOOM's and MPT's sub-layers add it themselves
            left = given["residual"] + left
        if self.returns is None:
            return left
        returned = [left, *[None] * (abs(self.returns) - 1)]
        return returned if self.returns < 0 else tuple(returned)


def remove_sublayer(layer, entry):
    """Leave the bias of a sub-layer's output projection; its norms are removed, too."""
    output = entry["output"]
    for path in entry["modules"]:
        module = layer.get_submodule(path)
        if path == output:
            left = RemovedProjection(module)
        elif output is None or output.startswith(f"{path}."):
            inside = output and output.removeprefix(f"{path}.")
            left = RemovedSublayer(module, inside, entry["returns"])
        else:  # a projection that belongs to the layer itself, as OPT's fc1 does
            left = nn.Identity()
        layer.set_submodule(path, left)
    for path in entry["norms"]:
        layer.set_submodule(path, RemovedNorm())


# What is different in a kept sub-layer ------------------------------------------------------------


def fit_sublayer(layer, entry, numbers, view):
    """Give a sub-layer other numbers of heads or channels.

    Args:
        layer: the decoder layer.
        entry: its sub-layer in `cut_table`.
        numbers: how many of each there are now, such as {"heads": 3, "kv_heads": 1}.
        view: the configuration that its modules shall see.
    """

    def now(before, shares):
        lost = (share * (dense[part] - numbers[part]) for part, share in shares.items())
        return before - sum(lost)

    dense = numbers_of(entry)
    for name, sizes in entry["sizes"].items():
        path, _, attribute = name.rpartition(".")
        owner = layer.get_submodule(path)
        tensor = getattr(owner, attribute)
        if tensor is None:  # a bias that this model does not have
            continue
        for dim, shares in sizes.items():
            tensor = tensor.narrow(int(dim), 0, now(tensor.shape[int(dim)], shares))
        narrowed = tensor.detach().clone()
        if attribute in owner._parameters:
            requires_grad = getattr(owner, attribute).requires_grad
            narrowed = nn.Parameter(narrowed, requires_grad=requires_grad)
        setattr(owner, attribute, narrowed)
        tell_width(owner)
    for name, shares in entry["counts"].items():
        path, _, attribute = name.rpartition(".")
        owner = layer.get_submodule(path)
        if attribute in vars(owner):
            setattr(owner, attribute, now(getattr(owner, attribute), shares))
    for name, part in entry.get("limits", {}).items():
        path, _, attribute = name.rpartition(".")
        owner = layer.get_submodule(path)
        setattr(owner, attribute, min(getattr(owner, attribute), numbers[part]))
    for path in entry["modules"]:
        for module in layer.get_submodule(path).modules():
            if "config" in vars(module):
                module.config = view


def numbers_of(entry):
    """How many heads or channels a sub-layer of the dense model has."""
    numbers = {part: entry[part] for part in PARTS if part in entry}
    if "kv_heads" in numbers:
        numbers["groups"] = numbers["heads"] // numbers["kv_heads"]
    return numbers


def tell_width(module):
    """Make the numbers that a module keeps about its weight agree with it."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)


def fit_attention(attention, entry, shape):
    """What an attention needs beside other widths: groups of different sizes, ALiBi slopes."""
    if shape.is_irregular:
        attention.q_heads_per_kv = list(shape.q_heads_per_kv)
        attention.register_forward_pre_hook(share_kv_heads, with_kwargs=True)
    if shape.alibi_heads is not None:
        attention.alibi_heads = list(shape.alibi_heads)
        attention.alibi_argument, attention.num_dense_heads = entry["alibi"], entry["heads"]
        attention.register_forward_pre_hook(pick_alibi_heads, with_kwargs=True)


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

    def get_seq_length(self, layer_idx=0):
        """Tokens that the cache has seen."""
        return 0 if self.cache is None else self.cache.get_seq_length(layer_idx)

    def __getattr__(self, name):
        return getattr(vars(self)["cache"], name)

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


def pick_alibi_heads(attention, args, kwargs):
    """Forward pre-hook: of all heads' slopes, [B * H, 1, T] or [H, 1, T], keep this layer's."""
    alibi = kwargs[attention.alibi_argument].unflatten(0, (-1, attention.num_dense_heads))
    picked = alibi[:, attention.alibi_heads].flatten(0, 1)
    return args, kwargs | {attention.alibi_argument: picked}


# The models ---------------------------------------------------------------------------------------


class HeterogeneousModel:
    """Mixin in front of a stock model class: builds it dense, then fits each layer to its shape."""

    def __init__(self, config, *args, **kwargs):
        pruned = pruned_config(config)
        if pruned is not config and pruned is not None:
            _register_text_model(pruned)
        with config.as_dense():
            super().__init__(config, *args, **kwargs)
        # not while a model around this one builds its dense parts
        if pruned is not None and pruned.is_pruned:
            self._fit_layers(pruned)

    @classmethod
    def is_custom_code(cls):
        """Its modules are initialised as those of transformers: Falcon-H1 needs it."""
        return False

    def initialize_weights(self):
        """As the stock class, which reads the dense model's widths."""
        with self.config.as_dense():
            super().initialize_weights()

    def _fit_layers(self, config):
        if config.cut_table is None:
            raise ValueError(
                "config.json has no cut_table: an earlier version of bonsai_fast saved this model; "
                "import bonsai_fast, then load it"
            )
        counting = config.counting_layer()
        for index, (layer, shape) in enumerate(
            zip(self._layers(config), config.layer_shapes(), strict=True)
        ):
            kind = config.kind_of_layer(index)
            layer.removed_sublayers = shape.removed
            for name in shape.removed:
                remove_sublayer(layer, kind[name])
            if shape.q_heads_per_kv:
                numbers = {"heads": shape.num_heads, "kv_heads": shape.num_kv_heads}
                # an irregular layer repeats its KV heads itself
                numbers["groups"] = 1 if shape.is_irregular else shape.q_heads_per_kv[0]
                fit_sublayer(layer, kind["attention"], numbers, config.layer_view(index))
                fit_attention(
                    layer.get_submodule(kind["attention"]["modules"][0]), kind["attention"], shape
                )
            numbers = {part: getattr(shape, part) for part in PARTS[2:]}
            if any(numbers.values()):
                fit_sublayer(layer, kind["mlp"], numbers, config.layer_view(index))
            if index == counting:
                own = config.per_layer_config[index]
                attention = layer.get_submodule(kind["attention"]["modules"][0])
                heads = own.num_key_value_heads or own.num_attention_heads
                attention.cache_shape = (index, heads, own.head_dim)
        # what is outside the layers, such as a rotary embedding, reads the dense model's widths
        dense = config.dense_copy()
        inside = {id(part) for layer in self._layers(config) for part in layer.modules()}
        for module in self.modules():
            reads = vars(module).get("config") is config and id(module) not in inside
            if reads and not isinstance(module, PreTrainedModel):
                module.config = dense
        if config.output_bias:
            self.add_output_biases()

    def _layers(self, config):
        return self.base_model.get_submodule(config.cut_table["layers"])

    def add_output_biases(self):
        """Give output projections that have none a bias of zero; also what is left of them."""
        config = pruned_config(self.config)
        like = next(self.parameters())
        for index, layer in enumerate(self._layers(config)):
            for entry in config.kind_of_layer(index).values():
                projection = layer.get_submodule(entry["output"] or "")
                if isinstance(projection, (nn.Linear, RemovedProjection)) and (
                    projection.bias is None
                ):
                    width = getattr(projection, "out_features", None) or projection.width
                    projection.bias = nn.Parameter(like.new_zeros(width))
                    config.output_bias = True


def _register_text_model(config):
    """Let `AutoModel`, by which some stock classes build their text model, know a pruned one."""
    stock_type = config.model_type.removeprefix("bonsai_")
    name = AUTO_CLASSES["AutoModel"].get(stock_type)
    if isinstance(name, str):
        model_class = bonsai_model(getattr(transformers, name))
        AutoModel._model_mapping.register(type(config), model_class, exist_ok=True)


# The classes --------------------------------------------------------------------------------------

_MADE: dict[str, type] = {}


def bonsai_model(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of pruned models for a stock model class, made once."""
    name = f"{PREFIX}{stock.__name__}"
    if name not in _MADE:
        _MADE[name] = _make(name, stock)
    return _MADE[name]


def _make(name: str, stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    config = bonsai_config(stock.config_class)
    autos = (auto for auto, names in AUTO_CLASSES.items() if stock.__name__ in names.values())
    generates = (GenerationMixin,) if issubclass(stock, GenerationMixin) else ()
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{stock.__name__} whose layers have the widths that its configuration gives.",
        "__annotations__": {"config": config},
        "config_class": config,
        "_auto_class": next(autos, None),
    }
    return type(name, (HeterogeneousModel, stock, *generates), namespace)


def __getattr__(name: str) -> Any:
    """`BonsaiLlamaForCausalLM`, and so on for every model class of transformers."""
    stock = (
        getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    )
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return bonsai_model(stock)
