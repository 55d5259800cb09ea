"""Configuration of a pruned decoder of any family: its layers differ in width.

`BonsaiLlamaConfig` and its like are made from the stock class when they are asked for: see
`__getattr__` at the end. This file travels with saved models.
"""

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

PREFIX = "Bonsai"
SUBLAYERS = ("attention", "mlp")
# The one name that transformers accepts in `layer_types` for "no attention, so no cache slot".
NO_ATTENTION = "moe"
# Layers of these types keep no keys, so they cannot tell how many tokens a cache has seen.
WITHOUT_KEYS = ("linear_attention", "conv", "mlp", NO_ATTENTION)
# What is left of layers that have attention and another mixer, without the attention.
WITHOUT_ATTENTION = {"hybrid": "linear_attention", "hybrid_sliding": "linear_attention"}
# Names of the MLP width in configurations; the first that a configuration has is its own.
CHANNELS_ATTRIBUTES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
# The same for the number of experts.
EXPERTS_ATTRIBUTES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# The same for the channels inside experts.
EXPERT_CHANNELS_ATTRIBUTES = ("moe_intermediate_size", "intermediate_size")
# mapping from model types to classes, by the auto class that uses it
AUTO_CLASSES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # of text models that transformers registers by the type of the model around them
    | {
        f"{kind}{end}": name
        for kind, name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        for end in ("_text", "_text_model")
        if f"{kind}{end}" in CONFIG_MAPPING_NAMES and name.endswith("ForCausalLM")
    },
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer keeps.

    Attributes:
        q_heads_per_kv: tuple, how many query heads read each KV head; empty if the attention is
            removed; None if the sub-layer is as in the dense model, because it cannot be cut or is
            no attention, or if there is none.
        channels: int, width of the MLP; 0 if it is removed; None as above.
        alibi_heads: the dense model's numbers of the query heads, for families whose ALiBi slopes
            depend on them.
        experts: int, how many a mixture of experts has; 0 if it is removed; None as above.
        expert_channels: int, width of each of its experts; None as above.
    """

    q_heads_per_kv: Any
    channels: Any
    alibi_heads: tuple[int, ...] | None = None
    experts: Any = None
    expert_channels: Any = None

    @property
    def num_heads(self):
        return None if self.q_heads_per_kv is None else sum(self.q_heads_per_kv)

    @property
    def num_kv_heads(self):
        return None if self.q_heads_per_kv is None else len(self.q_heads_per_kv)

    @property
    def is_irregular(self):
        """Whether some KV heads are read by more query heads than others."""
        return len(set(self.q_heads_per_kv or ())) > 1

    @property
    def removed(self):
        """Names of the removed sub-layers."""
        found = ("attention",) if self.q_heads_per_kv == () else ()
        return (*found, "mlp") if 0 in (self.channels, self.experts) else found


class ConfigView:
    """A configuration with other values in some places; the rest is read from it and written to it.

    Modules of a layer see the layer's own widths in this way, and caches which layers need no slot.
    """

    def __init__(self, config, **values):
        names = config.attribute_map
        vars(self)["_config"] = config
        vars(self)["_values"] = {names.get(name, name): value for name, value in values.items()}

    def __getattr__(self, name):
        if name.startswith("__") or name in ("_config", "_values"):  # while this is being copied
            raise AttributeError(name)
        name = self._config.attribute_map.get(name, name)
        return self._values[name] if name in self._values else getattr(self._config, name)

    def __setattr__(self, name, value):
        name = self._config.attribute_map.get(name, name)
        if name in self._values:
            self._values[name] = value
        else:
            setattr(self._config, name, value)

    def __iter__(self):
        return iter(self._config)


class HeterogeneousConfig:
    """Mixin in front of a stock configuration class.

    Global widths are the dense model's. `per_layer_config` holds what differs: the numbers of
    heads, the width `channels_attribute`, the number `experts_attribute`, `q_heads_per_kv`
    (irregular layers only), `alibi_heads` (models with ALiBi only), and `skip`, a list of
    "attention" and "mlp". With `output_bias` the output projections have biases where the stock
    class has none.

    `cut_table` says how the dense model's layers are cut. Names are relative to the layer:

        layers: path of the list of layers in the base model.
        kinds: the kinds of layers; each may have an "attention" and an "mlp" with
            modules, output: the sub-layer's modules and its output projection;
            norms: what is removed with it;
            returns: length of the tuple that it returns, negative for a list, None for a tensor;
            heads, kv_heads, channels, experts, expert_channels: how many there are in the dense
                model;
            sizes: for each parameter and dimension, how much of it belongs to each of them;
            counts: the same for numbers that are attributes of modules;
            limits: attributes that may not be larger than the number of these;
            alibi: argument of the attention that brings a bias for each head, if there is one.
        kind_of_layer: the kind of each layer, if there are several;
        dense_layers: the dense model's own `per_layer_config`, if it has one.

    A sub-layer without `sizes` is never cut: it stays as it is or is removed as a whole.
    """

    channels_attribute = CHANNELS_ATTRIBUTES[0]
    experts_attribute = EXPERTS_ATTRIBUTES[0]
    expert_channels_attribute = EXPERT_CHANNELS_ATTRIBUTES[0]
    # bonsai_fast puts a function here: the table of a directory that an earlier version saved
    earlier_cut_table = None

    def __post_init__(self, **kwargs):
        per_layer_config = kwargs.pop("per_layer_config", None)
        if self.cut_table is None and per_layer_config is not None:
            self._read_earlier_layer_types(kwargs, per_layer_config)
        if not _is_ours(kwargs.get("auto_map")):
            kwargs["auto_map"] = default_auto_map(type(self))
        if not self.stock_has_head_dim:
            self._fill_head_dim()
        if (dense := (self.cut_table or {}).get("dense_layers")) is not None:
            kwargs["per_layer_config"] = dense
        super().__post_init__(**kwargs)
        self._fill_head_dim()
        if per_layer_config is not None:
            # after the stock class has read its global widths
            self.per_layer_config = per_layer_config
            if self.cut_table is None and self.earlier_cut_table is not None:
                self.cut_table = self.earlier_cut_table()

    @contextmanager
    def as_dense(self):
        """While this holds, the configuration is the dense model's, as stock code expects it."""
        spec = self.__dict__.pop("_heterogeneity_spec", None)
        was_dense = self.__dict__.get("_is_dense", False)
        self.__dict__["_is_dense"] = True
        try:
            self.per_layer_config = (self.cut_table or {}).get("dense_layers")
            yield self
        finally:
            self.__dict__.pop("_is_dense")
            if was_dense:
                self.__dict__["_is_dense"] = True
            self.__dict__.pop("_heterogeneity_spec", None)
            if spec is not None:
                self.__dict__["_heterogeneity_spec"] = spec

    def dense_copy(self):
        """The dense model's configuration, for good."""
        with self.as_dense():
            return copy.copy(self)

    @property
    def is_pruned(self):
        """Whether layers have shapes of their own, and nobody looks at the dense model now."""
        return self.is_heterogeneous and not self.__dict__.get("_is_dense", False)

    def layer_shapes(self):
        """`LayerShape` of every decoder layer."""
        return [self._shape(index) for index in range(len(self.per_layer_config))]

    def kind_of_layer(self, index):
        """The entry of `cut_table` for a layer; None if there is no table."""
        if self.cut_table is None:
            return None
        kinds = self.cut_table.get("kind_of_layer")
        return self.cut_table["kinds"][kinds[index] if kinds else 0]

    @classmethod
    def layer_overrides(cls, shape: LayerShape) -> dict[str, Any]:
        """The entry of `per_layer_config` that describes a `LayerShape`."""
        entry: dict[str, Any] = {}
        if shape.removed:
            entry["skip"] = list(shape.removed)
        if shape.num_heads:
            name = cls.attribute_map.get("num_attention_heads", "num_attention_heads")
            entry[name] = shape.num_heads
            entry["num_key_value_heads"] = shape.num_kv_heads
            if shape.is_irregular:
                entry["q_heads_per_kv"] = list(shape.q_heads_per_kv)
            if shape.alibi_heads is not None:
                entry["alibi_heads"] = list(shape.alibi_heads)
        if shape.channels:
            entry[cls.channels_attribute] = shape.channels
        if shape.experts:
            entry[cls.experts_attribute] = shape.experts
        if shape.expert_channels:
            entry[cls.expert_channels_attribute] = shape.expert_channels
        return entry

    def layer_view(self, index):
        """The configuration as the modules of one layer see it."""
        layer = self.per_layer_config[index]
        names = self.per_layer_attributes or ()
        return ConfigView(self, **{name: getattr(layer, name, None) for name in names})

    # Caches ---------------------------------------------------------------------------------------

    def get_text_config(self, decoder=None, encoder=None):
        """As the stock class, but caches, which ask for the decoder's, learn who needs no slot."""
        found = super().get_text_config(decoder=decoder, encoder=encoder)
        return found.for_caches() if decoder and isinstance(found, HeterogeneousConfig) else found

    def for_caches(self):
        """Marks layers without attention: an empty slot would report a length of 0."""
        removed = self._without_attention()
        if not any(removed):
            return self
        counts = self.counting_layer()
        types = [
            WITHOUT_ATTENTION.get(kind, NO_ATTENTION) if gone and index != counts else kind
            for index, (gone, kind) in enumerate(zip(removed, self._kinds(), strict=True))
        ]
        return ConfigView(self, layer_types=types)

    def counting_layer(self):
        """The layer whose removed attention keeps a cache slot, if no layer has attention.

        Somebody has to count the positions; see `RemovedSublayer`.
        """
        removed = self._without_attention()
        attends = [kind not in WITHOUT_KEYS for kind in self._kinds()]
        if not any(removed) or any(
            there and not gone for there, gone in zip(attends, removed, strict=True)
        ):
            return None
        return next((index for index, there in enumerate(attends) if there), None)

    def _without_attention(self):
        if not self.is_heterogeneous:
            return [False]
        return ["attention" in getattr(layer, "skip", ()) for layer in self.per_layer_config]

    def _kinds(self):
        types = getattr(self, "layer_types", None)
        if types is not None:
            return types
        kind = "full_attention"
        if getattr(self, "sliding_window", None) is not None:
            kind = "sliding_attention"
        elif getattr(self, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        return [kind] * self.num_hidden_layers

    # Checks ---------------------------------------------------------------------------------------

    def validate_architecture(self):
        """Every layer's widths are positive and fit each other, whatever `hidden_size` is."""
        for index, layer in enumerate(self.per_layer_config):
            where = f"per_layer_config[{index}]"
            skip = getattr(layer, "skip", ())
            if unknown := set(skip).difference(SUBLAYERS):
                raise ValueError(
                    f"{where}: skip: expected some of {list(SUBLAYERS)}, got {sorted(unknown)}"
                )
            shape = self._shape(index)
            groups = shape.q_heads_per_kv
            if "attention" not in skip and groups is not None:
                heads, kv_heads = self._heads(layer, self._dense(index, "attention"))
                if sum(groups) != heads or len(groups) != kv_heads or min(groups, default=0) < 1:
                    raise ValueError(
                        f"{where}: {heads} query heads do not fill {kv_heads} KV groups {groups}"
                    )
                if shape.alibi_heads is not None and len(shape.alibi_heads) != heads:
                    raise ValueError(
                        f"{where}: alibi_heads: expected {heads} of them, got {shape.alibi_heads}"
                    )
            if "mlp" not in skip and shape.channels is not None and shape.channels < 1:
                raise ValueError(f"{where}: {self.channels_attribute} must be positive")
            if "mlp" not in skip and shape.experts is not None and shape.experts < 1:
                raise ValueError(f"{where}: {self.experts_attribute} must be positive")

    def _shape(self, index):
        layer = self.per_layer_config[index]
        skip = getattr(layer, "skip", ())
        groups, alibi_heads = (), None
        if "attention" not in skip:
            groups = self._groups(layer, self._dense(index, "attention"))
            alibi_heads = getattr(layer, "alibi_heads", None)
        mlp = self._dense(index, "mlp")
        names = {"channels": self.channels_attribute} if self.cut_table is None else {}
        for part, name in (
            ("channels", self.channels_attribute),
            ("experts", self.experts_attribute),
            ("expert_channels", self.expert_channels_attribute),
        ):
            if part in mlp:
                names[part] = name
        widths = {part: _number(layer, name, mlp.get(part)) for part, name in names.items()}
        if "mlp" in skip:
            # with experts the output projection is None
            widths = {"experts" if mlp and mlp["output"] is None else "channels": 0}
        widths = {"channels": None} | widths
        return LayerShape(groups, alibi_heads=alibi_heads and tuple(alibi_heads), **widths)

    def _dense(self, index, sublayer):
        """A sub-layer's entry of the table; empty if there is none."""
        return (self.kind_of_layer(index) or {}).get(sublayer) or {}

    def _groups(self, layer, attention):
        if self.cut_table is not None and "heads" not in attention:
            return None
        heads, kv_heads = self._heads(layer, attention)
        if heads is None:
            return None
        return tuple(layer.q_heads_per_kv or [heads // kv_heads] * kv_heads)

    def _heads(self, layer, attention):
        heads = _number(layer, "num_attention_heads", attention.get("heads"))
        dense, dense_kv = attention.get("heads"), attention.get("kv_heads")
        otherwise = heads if dense == dense_kv else dense_kv
        return heads, _number(layer, "num_key_value_heads", otherwise)

    def _fill_head_dim(self):
        names = ("head_dim", "num_attention_heads", "hidden_size")
        known, heads, width = (
            self._getattr_without_heterogeneous_validation(n, None) for n in names
        )
        if known is None and isinstance(heads, int) and isinstance(width, int):
            self.head_dim = width // heads

    def _read_earlier_layer_types(self, kwargs, per_layer_config):
        """Earlier versions marked layers without attention in the configuration itself."""
        if "layer_types" not in self.__dataclass_fields__:
            kwargs.pop("layer_types", None)
        elif self.layer_types is not None:
            removed = {
                int(index)
                for index, entry in per_layer_config.items()
                if "attention" in entry.get("skip", ())
            }
            others = [kind for kind in self.layer_types if kind != NO_ATTENTION]
            self.layer_types = [
                (others or ["full_attention"])[0]
                if index in removed and kind == NO_ATTENTION
                else kind
                for index, kind in enumerate(self.layer_types)
            ]


class HeterogeneousWrapperConfig:
    """Mixin in front of a stock configuration class that holds a text model's configuration.

    The latter is a `HeterogeneousConfig`; whatever else the model has is as in the dense one.
    """

    def __post_init__(self, **kwargs):
        if not _is_ours(kwargs.get("auto_map")):
            kwargs["auto_map"] = default_auto_map(type(self))
        for name in self.sub_configs:
            values = getattr(self, name, None)
            if isinstance(values, dict):
                stock_type = str(values.get("model_type")).removeprefix("bonsai_")
                if stock_type != values.get("model_type"):
                    stock = getattr(transformers, CONFIG_MAPPING_NAMES[stock_type])
                    setattr(self, name, bonsai_config(stock)(**values))
        super().__post_init__(**kwargs)
        if self.pruned is not None:
            vars(self.pruned).pop("auto_map", None)  # it is loaded as a part of this one

    @property
    def pruned(self):
        """The text model's configuration; None in one that transformers makes by default."""
        inner = (getattr(self, name, None) for name in self.sub_configs)
        return next((part for part in inner if isinstance(part, HeterogeneousConfig)), None)

    @contextmanager
    def as_dense(self):
        """As of the text model's configuration."""
        with nullcontext() if self.pruned is None else self.pruned.as_dense():
            yield self

    def get_text_config(self, decoder=None, encoder=None):
        """As the stock class, but caches learn which layers need no slot."""
        found = super().get_text_config(decoder=decoder, encoder=encoder)
        return found.for_caches() if decoder and found is self.pruned else found


def pruned_config(config: Any) -> Any:
    """The `HeterogeneousConfig` of a model's configuration: it or its part; None if it has none."""
    # not by class: with `trust_remote_code` two copies of this file are loaded, from two folders
    if hasattr(type(config), "layer_shapes"):
        return config
    return config.pruned if hasattr(type(config), "pruned") else None


def _number(layer, name, otherwise):
    """A width of a layer; `otherwise` if the configuration has no such number."""
    value = getattr(layer, name, None)
    return value if isinstance(value, int) else otherwise


def default_auto_map(config_class):
    """Where `trust_remote_code=True` finds the classes, by the file names in their folder."""
    names = auto_class_names(config_class.model_type.removeprefix("bonsai_"))
    return {"AutoConfig": f"configuration_bonsai.{config_class.__name__}"} | {
        auto: f"modeling_bonsai.{PREFIX}{name}" for auto, name in names.items()
    }


def auto_class_names(stock_type):
    """Stock class by auto class for a model type; of a wrapper not that of its text model alone."""
    names = {auto: mapping.get(stock_type) for auto, mapping in AUTO_CLASSES.items()}
    wrapper = names.get("AutoModelForImageTextToText")
    if wrapper is not None and names.get("AutoModelForCausalLM") != wrapper:
        del names["AutoModelForCausalLM"]
    return {auto: name for auto, name in names.items() if isinstance(name, str)}


def _is_ours(auto_map):
    """Whether an entry `auto_map` names the files of this version."""
    files = ("configuration_bonsai.", "modeling_bonsai.")
    return bool(auto_map) and all(
        isinstance(name, str) and name.rpartition("--")[2].startswith(files)
        for name in auto_map.values()
    )


# The classes --------------------------------------------------------------------------------------

_MADE: dict[str, type] = {}
# fields that a stock class may lack
_FIELDS: dict[str, tuple[Any, Any]] = {
    "head_dim": (int | None, None),
    "num_key_value_heads": (int | None, None),
    "q_heads_per_kv": (list[int] | None, None),
    "alibi_heads": (list[int] | None, None),
    "output_bias": (bool, False),
    "cut_table": (dict | None, None),
}


def bonsai_config(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of pruned models for a stock configuration class, made once."""
    name = f"{PREFIX}{stock.__name__}"
    if name not in _MADE:
        _MADE[name] = _make(name, stock)
    return _MADE[name]


def _make(name: str, stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    known = {*stock.__dataclass_fields__, *stock.attribute_map}
    if stock.sub_configs and "num_hidden_layers" not in known:
        return _make_wrapper(name, stock)
    width, experts, inside = (
        next((field for field in names if field in known), names[0])
        for names in (CHANNELS_ATTRIBUTES, EXPERTS_ATTRIBUTES, EXPERT_CHANNELS_ATTRIBUTES)
    )
    fields = _FIELDS | {width: (int | None, None)}
    new = {field: value for field, value in fields.items() if field not in known}
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{stock.__name__} whose layers may differ; see `HeterogeneousConfig`.",
        "__annotations__": {field: kind for field, (kind, _) in new.items()},
        "model_type": f"bonsai_{stock.model_type}",
        "channels_attribute": width,
        "experts_attribute": experts,
        "expert_channels_attribute": inside,
        "stock_has_head_dim": "head_dim" in known,
        "_auto_class": "AutoConfig",
    }
    namespace |= {field: default for field, (_, default) in new.items()}
    for check in dir(stock):
        if check.startswith("validate_") and check not in vars(HeterogeneousConfig):
            namespace[check] = _dense_check(getattr(stock, check))
    made: type[PreTrainedConfig] = strict(type(name, (HeterogeneousConfig, stock), namespace))
    return made


def _make_wrapper(name: str, stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{stock.__name__} with a pruned text model.",
        "model_type": f"bonsai_{stock.model_type}",
        "_auto_class": "AutoConfig",
    }
    namespace |= {
        check: _dense_check(getattr(stock, check))
        for check in dir(stock)
        if check.startswith("validate_")
    }
    bases = (HeterogeneousWrapperConfig, stock)
    made: type[PreTrainedConfig] = strict(type(name, bases, namespace))
    return made


def _dense_check(check):
    """A check of the stock class, which reads global widths."""

    def checked(self):
        with self.as_dense():
            check(self)

    return checked


def __getattr__(name: str) -> Any:
    """`BonsaiLlamaConfig`, and so on for every configuration class of transformers."""
    stock = None
    if name.startswith(PREFIX) and name.endswith("Config"):
        stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return bonsai_config(stock)
