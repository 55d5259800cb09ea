"""Which part of a model is the decoder: the layers that feed the LM head."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models.layer_runs import FAILURES, DecoderRun, LayerRun, run_decoder, traced
from bonsai_fast.models.stand_in import make_stand_in


class UnsupportedModelError(ValueError):
    """The model has no decoder that can be pruned; the message names what was looked for."""


def describe_model(model: PreTrainedModel) -> str:
    """The model's class and type, for messages."""
    return f"{type(model).__name__} (model type {model.config.model_type!r})"


def refuse(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    """The error that says in one line why a model cannot be pruned."""
    return UnsupportedModelError(f"{describe_model(model)} cannot be pruned: {reason}")


def run_text_decoder(model: PreTrainedModel) -> tuple[str, str, DecoderRun]:
    """Run a cheap copy of the decoder that feeds a model's LM head.

    Returns:
        path of the decoder in the model, path of its ModuleList of layers in the decoder, the run.
    Raises:
        UnsupportedModelError: there is no such decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse(model, "it is an encoder-decoder; expected a decoder-only language model")
    if "shared_kv_states" in inspect.signature(model.forward).parameters:  # Gemma 4's assistants
        raise refuse(model, "its layers read keys and values of another model")
    decoder = model.get_decoder()
    if not any(map(_is_list, decoder.modules())):  # ModernBERT's LM head is named decoder
        decoder = model.base_model
    path = next((name for name, module in model.named_modules() if module is decoder), None)
    if path is None:
        raise refuse(model, "its decoder is not one of its own modules")
    if any(name.rpartition(".")[2] in CROSS_ATTENTION for name, _ in decoder.named_modules()):
        raise refuse(model, "its layers also attend to an encoder; expected a decoder-only model")
    stand_in = make_stand_in(decoder)
    try:
        with traced():
            run = run_decoder(stand_in)
    except FAILURES as error:
        line = str(error).partition("\n")[0]
        raise refuse(
            model, f"its decoder cannot be run on token ids alone ({type(error).__name__}: {line})"
        ) from error
    layers = _layer_list(model, run)
    if "encoder" in f"{path}.{layers}".split("."):
        raise refuse(model, "its layers are those of an encoder; expected a decoder")
    return path, layers, run


CROSS_ATTENTION = frozenset({"encoder_attn", "crossattention", "cross_attn", "encoder_attention"})


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def _layer_list(model: PreTrainedModel, run: DecoderRun) -> str:
    found = [path for path, runs in run.lists.items() if any(_has_work(r) for r in runs.values())]
    if not found and run.lists:  # pruned before, of everything
        found = [path for path, runs in run.lists.items() if runs][:1]
    if not found:
        raise refuse(
            model, "no list of layers whose input and output are hidden states [B, T, D] was found"
        )
    if len(found) > 1:
        raise refuse(model, f"it has several stacks of layers ({', '.join(found)})")
    runs = run.lists[found[0]]
    if any(layer.num_calls > 1 for layer in runs.values()):
        raise refuse(model, "its layers run more than once for each token")
    module = run.stand_in.decoder.get_submodule(found[0])
    if len(runs) < len(list(module.children())):
        raise refuse(model, f"only {len(runs)} of its layers run on text alone")
    return found[0]


def _has_work(run: LayerRun) -> bool:
    return sum(isinstance(module, nn.Linear) for module in run.layer.modules()) > 1
