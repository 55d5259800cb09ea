"""Makes transformers know the classes of pruned models, without importing any family."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from bonsai_fast.hub import configuration_bonsai
from bonsai_fast.hub.configuration_bonsai import (
    AUTO_CLASSES,
    PREFIX,
    HeterogeneousConfig,
    auto_class_names,
    bonsai_config,
)
from bonsai_fast.hub.earlier_versions import earlier_cut_table
from bonsai_fast.hub.modeling_bonsai import bonsai_model


class HubClasses(NamedTuple):
    """The classes of one family.

    Attributes:
        config: of the model; for a text model inside a wrapper, of the wrapper.
        models: for each auto class that loads such a model, its class.
    """

    config: type[PreTrainedConfig]
    models: dict[str, type[PreTrainedModel]]

    @property
    def model(self) -> type[PreTrainedModel]:
        """The base model."""
        return self.models["AutoModel"]

    @property
    def causal_lm(self) -> type[PreTrainedModel]:
        """The model with its LM head."""
        return next(model for auto, model in self.models.items() if auto != "AutoModel")


def model_types() -> dict[str, str]:
    """Every stock model type that a pruned model can be made from, with its class's name."""
    kinds = [
        kind
        for auto, names in AUTO_CLASSES.items()
        for kind in names
        if auto != "AutoModel" and kind in CONFIG_MAPPING_NAMES
    ]
    found = {kind: auto_class_names(kind) for kind in kinds}
    return {
        kind: names.get("AutoModelForImageTextToText") or names["AutoModelForCausalLM"]
        for kind, names in found.items()
        if names.keys() - {"AutoModel"}
    }


@cache
def hub_classes(model_type: str) -> HubClasses:
    """Classes for pruned models of a family; transformers knows them from here on.

    Args:
        model_type: the stock model type, e.g. "llama".
    Raises:
        KeyError: transformers has no such language model.
    """
    config = bonsai_config(getattr(transformers, CONFIG_MAPPING_NAMES[model_type]))
    models: dict[str, type[PreTrainedModel]] = {}
    for auto, name in auto_class_names(model_type).items():
        models[auto] = bonsai_model(getattr(transformers, name))
        # not by `register`: some stock classes serve several configuration classes
        mapping = getattr(transformers, auto)._model_mapping
        mapping.register(config, models[auto], exist_ok=True)
    return HubClasses(config, models)


class _LazyConfig:
    """Stands for the configuration class of a family until a configuration is read or made."""

    model_type: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`."""
        return cls._real().from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`."""
        return cls._real().from_pretrained(*args, **kwargs)

    @classmethod
    def _real(cls) -> type[PreTrainedConfig]:
        return hub_classes(cls.model_type.removeprefix("bonsai_")).config


@cache
def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know every bonsai_* model type.

    Calling this again changes nothing.
    """
    HeterogeneousConfig.earlier_cut_table = earlier_cut_table
    for stock_type in model_types():
        model_type = f"bonsai_{stock_type}"
        name = f"{PREFIX}{CONFIG_MAPPING_NAMES[stock_type]}"
        namespace = {"__module__": configuration_bonsai.__name__, "model_type": model_type}
        AutoConfig.register(model_type, type(name, (_LazyConfig,), namespace), exist_ok=True)
