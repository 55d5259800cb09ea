"""Low-rank adapters of linear layers (peft), trained beside the weights and then merged."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models import find_decoder
from bonsai_fast.recovery.distill.recipe import Adapted
from bonsai_fast.recovery.distill.trained_part import trained_dtype
from bonsai_fast.recovery.distill.zero_masks import ZeroMasks

INSTALL_COMMAND = 'pip install "bonsai-fast[recover]"'
ADAPTER = "default"
QUERY_VALUE = ("q_proj", "v_proj")
# projections that hold query and value in one
FUSED = ("qkv_proj", "query_key_value")


def check_installed() -> None:
    """Raise ValueError, with the command that installs it, if peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"adapters are trained with peft, which is not installed: {INSTALL_COMMAND}; "
            "or choose --recover distill --recover-weights all"
        )


def adapted_layers(model: PreTrainedModel, which: Adapted) -> list[str]:
    """Paths of the linear layers of the decoder that get adapters.

    Raises:
        ValueError: there are none.
    """
    path = find_decoder(model).path
    linear = [
        f"{path}.{name}"
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel()
    ]
    if which == "query and value projections":
        linear = [name for name in linear if name.rpartition(".")[2] in (*QUERY_VALUE, *FUSED)]
    if not linear:
        raise ValueError(f"expected {which} in the model's decoder layers, found none")
    return linear


class LoraAdapters:
    """weight + scale * B A for some linear layers, with A and B in float32.

    Args:
        model: gets the adapters, in place.
        layers: paths of the linear layers.
        rank, scale, dropout: of the adapters.
        zeros: of a sparse model: its layers are then run with the sum of weight and masked update,
            so that the loss is that of the merged model; without dropout.
        autocast: whether the model is run in autocast, which chooses the dtype of products.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[str],
        *,
        rank: int,
        scale: float,
        dropout: float,
        zeros: ZeroMasks | None,
        autocast: bool,
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        config = LoraConfig(
            r=rank,
            lora_alpha=round(rank * scale),
            lora_dropout=dropout,
            target_modules=layers,
            bias="none",
        )
        if zeros is not None:
            from bonsai_fast.recovery.distill.masked_lora import MaskedLoraLinear

            # peft's way to give a class of layers an adapter of one's own
            config._register_custom_module({nn.Linear: MaskedLoraLinear})
        self._model = model
        self._tuner: Any = LoraModel(model, config, ADAPTER)
        self._layers: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
        for layer in self._layers.values():
            layer.cast_input_dtype_enabled = not autocast
            layer.eval()
            for part in (layer.lora_A, layer.lora_B):
                weight = part[ADAPTER].weight
                weight.data = weight.data.to(trained_dtype(weight.dtype))
        self._parameters = {
            f"{name}.{letter}": getattr(layer, letter)[ADAPTER].weight
            for name, layer in self._layers.items()
            for letter in ("lora_A", "lora_B")
        }

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """See `TrainedPart`."""
        return self._parameters

    def mask_gradients(self) -> None:
        """See `TrainedPart`; the update is masked, not the factors."""

    def set_dropout(self, active: bool) -> None:
        """See `TrainedPart`."""
        for layer in self._layers.values():
            layer.lora_dropout.train(active)

    def finish(self) -> None:
        """See `TrainedPart`; the sum is taken in float32 and rounded once."""
        for layer in self._layers.values():
            weight = layer.get_base_layer().weight
            update = layer.get_delta_weight(ADAPTER)
            weight.data = (weight.data.to(update.dtype) + update).to(weight.dtype)
        self._tuner.unload()
        vars(self._model).pop("peft_config", None)
