"""Configuration of a decoder whose layers differ in width; what all bonsai_* families share.

This file travels with saved models: it imports nothing but the standard library.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# The one name that transformers accepts in `layer_types` for "no attention, so no cache slot".
NO_ATTENTION = "moe"
SUBLAYERS = ("attention", "mlp")


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer keeps.

    Attributes:
        q_heads_per_kv: how many query heads read each KV head; empty if the attention is gone.
        channels: width of the MLP; 0 if the MLP is gone.
        alibi_heads: the dense model's numbers of the query heads, for families whose ALiBi slopes
            hang on them.
    """

    q_heads_per_kv: tuple[int, ...]
    channels: int
    alibi_heads: tuple[int, ...] | None = None

    @property
    def num_heads(self):
        return sum(self.q_heads_per_kv)

    @property
    def num_kv_heads(self):
        return len(self.q_heads_per_kv)

    @property
    def is_irregular(self):
        """Whether some KV heads are read by more query heads than others."""
        return len(set(self.q_heads_per_kv)) > 1


class HeterogeneousConfig:
    """Mixin in front of a stock configuration class.

    Global widths are the dense model's. `per_layer_config` holds what differs: the numbers of
    heads, the width `channels_attribute`, `q_heads_per_kv` (irregular layers only), `alibi_heads`
    (BLOOM only), and `skip`, a list of "attention" and "mlp". With `output_bias` the output
    projections have biases where the stock class has none. A subclass declares the fields that its
    stock class lacks, and is decorated with `@strict` so that the checks below replace the
    stock ones.
    """

    channels_attribute = "intermediate_size"

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if "layer_types" not in self.__dataclass_fields__:
            kwargs.pop("layer_types", None)  # follows from `skip`, and MistralConfig warns about it
        kwargs.setdefault("auto_map", self.default_auto_map())
        super().__post_init__(**kwargs)
        self._mark_layers_without_attention()

    @classmethod
    def default_auto_map(cls):
        """Where `trust_remote_code=True` finds the classes, by the file names in this folder."""
        prefix = cls.__name__.removesuffix("Config")
        return {
            "AutoConfig": f"configuration_{cls.model_type}.{prefix}Config",
            "AutoModel": f"modeling_{cls.model_type}.{prefix}Model",
            "AutoModelForCausalLM": f"modeling_{cls.model_type}.{prefix}ForCausalLM",
        }

    @contextmanager
    def as_dense(self):
        """While this holds, the configuration is the dense model's, as stock code expects it."""
        spec = self.__dict__.pop("_heterogeneity_spec", None)
        try:
            yield self
        finally:
            if spec is not None:
                self.__dict__["_heterogeneity_spec"] = spec

    def layer_shapes(self):
        """`LayerShape` of every decoder layer."""
        return [self._shape(layer) for layer in self.per_layer_config]

    @classmethod
    def layer_overrides(cls, shape: LayerShape) -> dict[str, Any]:
        """The entry of `per_layer_config` that describes a `LayerShape`."""
        entry = {}
        sizes = {"attention": shape.num_heads, "mlp": shape.channels}
        if skip := [name for name, size in sizes.items() if not size]:
            entry["skip"] = skip
        if shape.num_heads:
            entry[cls.attribute_map.get("num_attention_heads", "num_attention_heads")] = (
                shape.num_heads
            )
            if "num_key_value_heads" in cls.__dataclass_fields__:
                entry["num_key_value_heads"] = shape.num_kv_heads
            if shape.is_irregular:
                entry["q_heads_per_kv"] = list(shape.q_heads_per_kv)
            if shape.alibi_heads is not None:
                entry["alibi_heads"] = list(shape.alibi_heads)
        if shape.channels:
            entry[cls.channels_attribute] = shape.channels
        return entry

    def validate_architecture(self):
        """Every layer's widths are positive and fit each other, whatever `hidden_size` is."""
        for index, layer in enumerate(self.per_layer_config):
            where = f"per_layer_config[{index}]"
            skip = getattr(layer, "skip", ())
            if unknown := set(skip).difference(SUBLAYERS):
                raise ValueError(
                    f"{where}: skip: expected some of {list(SUBLAYERS)}, got {sorted(unknown)}"
                )
            shape = self._shape(layer)
            if "attention" not in skip:
                heads = layer.num_attention_heads
                kv_heads = getattr(layer, "num_key_value_heads", None) or heads
                groups = shape.q_heads_per_kv
                if sum(groups) != heads or len(groups) != kv_heads or min(groups, default=0) < 1:
                    raise ValueError(
                        f"{where}: {heads} query heads do not fill {kv_heads} KV groups {groups}"
                    )
                if shape.alibi_heads is not None and len(shape.alibi_heads) != heads:
                    raise ValueError(
                        f"{where}: alibi_heads: expected {heads} of them, got {shape.alibi_heads}"
                    )
            if "mlp" not in skip and shape.channels < 1:
                raise ValueError(f"{where}: {self.channels_attribute} must be positive")

    def validate_rope(self):
        """The stock checks read global widths."""
        with self.as_dense():
            super().validate_rope()

    def _shape(self, layer):
        skip = getattr(layer, "skip", ())
        groups, alibi_heads = (), None
        if "attention" not in skip:
            heads = layer.num_attention_heads
            kv_heads = getattr(layer, "num_key_value_heads", None) or heads
            groups = tuple(layer.q_heads_per_kv or [heads // kv_heads] * kv_heads)
            alibi_heads = getattr(layer, "alibi_heads", None)
        channels = 0 if "mlp" in skip else getattr(layer, self.channels_attribute)
        return LayerShape(groups, channels, alibi_heads and tuple(alibi_heads))

    def _mark_layers_without_attention(self):
        """Give layers without attention no cache slot: an empty slot reports a length of 0."""
        without = ["attention" in getattr(layer, "skip", ()) for layer in self.per_layer_config]
        if all(without):
            without[0] = False  # somebody has to count the positions: see `RemovedAttention`
        if any(without):
            windowed = getattr(self, "sliding_window", None) is not None
            kind = "sliding_attention" if windowed else "full_attention"
            types = getattr(self, "layer_types", None) or [kind] * self.num_hidden_layers
            if not without[0] and types[0] == NO_ATTENTION:
                types = [kind, *types[1:]]  # gone before, and now the one that counts
            self.layer_types = [
                NO_ATTENTION if none else own for none, own in zip(without, types, strict=True)
            ]
