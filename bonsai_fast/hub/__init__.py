"""Model classes that a pruned model needs, and the files that travel with it.

Nothing here may import the rest of bonsai_fast: the files are copied beside the weights, and run
there with `trust_remote_code=True` on a machine without this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from bonsai_fast.hub.heterogeneous_config import HeterogeneousConfig, LayerShape

__all__ = [
    "FAMILIES",
    "HeterogeneousConfig",
    "HubClasses",
    "LayerShape",
    "hub_classes",
    "register",
    "takes_output_biases",
]

# stock model type -> how the family spells itself in class names
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "phi3": "Phi3",
    "phi": "Phi",
    "opt": "OPT",
    "bloom": "Bloom",
    "gpt_neox": "GPTNeoX",
}


class HubClasses(NamedTuple):
    """The classes of one family."""

    config: type[HeterogeneousConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


def hub_classes(family: str) -> HubClasses:
    """Classes for pruned models of a family.

    Args:
        family: the stock model type, e.g. "llama".
    Raises:
        KeyError: no such family; `FAMILIES` lists them.
    """
    prefix = f"Bonsai{FAMILIES[family]}"
    configuration = import_module(f"{__name__}.configuration_bonsai_{family}")
    modeling = import_module(f"{__name__}.modeling_bonsai_{family}")
    return HubClasses(
        getattr(configuration, f"{prefix}Config"),
        getattr(modeling, f"{prefix}Model"),
        getattr(modeling, f"{prefix}ForCausalLM"),
    )


def takes_output_biases(model_type: str) -> bool:
    """Whether pruned models of this type's family can hold output biases that the stock ones lack.

    `model.base_model.add_output_biases()` gives them to one of a bonsai_* class.
    """
    family = model_type.removeprefix("bonsai_")
    return family in FAMILIES and hasattr(hub_classes(family).config, "output_bias")


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know every bonsai_* model type.

    Saving such a model then also copies the files that it needs elsewhere. Calling this again
    changes nothing.
    """
    for family in FAMILIES:
        config, model, causal_lm = hub_classes(family)
        for auto_class, hub_class in ((AutoModel, model), (AutoModelForCausalLM, causal_lm)):
            auto_class.register(config, hub_class, exist_ok=True)
            hub_class.register_for_auto_class(auto_class)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        config.register_for_auto_class(AutoConfig)
