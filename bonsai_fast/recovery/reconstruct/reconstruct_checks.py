"""What reconstruction refuses, before any work."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.memory import default_budget, parse_bytes
from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.layerwise import check_memory
from bonsai_fast.models import find_decoder
from bonsai_fast.recovery.recovery_task import RecoveryTask

DTYPES = (torch.float32, torch.bfloat16)
# two texts in two models, and the targets of each
STATES = 6


def check_models(task: RecoveryTask) -> None:
    """Raise ValueError, one line, if a model cannot be trained or the two do not fit."""
    for name, model in (("pruned model", task.student), ("parent", task.teacher)):
        config = model.config
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"reconstruct: the {name} is quantized; expected weights in bfloat16 or float32"
            )
    sizes = {
        "layers": [find_decoder(model).num_layers for model in (task.student, task.teacher)],
        "hidden states": [_hidden_size(model) for model in (task.student, task.teacher)],
    }
    for what, (found, wanted) in sizes.items():
        if found != wanted:
            raise ValueError(
                f"reconstruct: expected as many {what} in the pruned model as in its parent "
                f"({wanted}), got {found}"
            )
    for name, parameter in task.student.named_parameters():
        if parameter.dtype not in DTYPES:
            raise ValueError(
                f"reconstruct: expected weights in bfloat16 or float32, got {parameter.dtype} in "
                f"{name}; load the model with --dtype bfloat16"
            )
    devices = {str(parameter.device) for parameter in task.student.parameters()}
    if stream_of(task.student) is None and len(devices) > 1:
        raise ValueError(
            f"reconstruct: expected the pruned model on one device, got {sorted(devices)}"
        )


def check_texts(task: RecoveryTask) -> None:
    """Raise ValueError, one line, if a text cannot be used."""
    vocabulary = min(
        cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        for model in (task.student, task.teacher)
    )
    for name, text in (("text", task.text), ("held-out text", task.held_out)):
        sequences, length = text.input_ids.shape
        if sequences < 1 or length < 2:
            raise ValueError(
                f"reconstruct: the {name} is too short, expected a sequence of 2 tokens or more, "
                f"got {sequences} x {length}"
            )
        if int(text.input_ids.max()) >= vocabulary:
            raise ValueError(
                f"reconstruct: the {name} holds token {int(text.input_ids.max())}, but the models "
                f"know {vocabulary}: expected a pruned model and a parent with one tokenizer"
            )
        for model in (task.student, task.teacher):
            try:
                check_memory(model, length, memory_budget=budget_of_states(task, model))
            except ValueError as error:
                raise ValueError(
                    f"{error}, a sixth of the whole: two texts, in two models and as targets"
                ) from error


def budget_of_states(task: RecoveryTask, model: PreTrainedModel) -> int:
    """Bytes for each text in a model."""
    budget = task.memory_budget
    whole = default_budget(model.device) if budget is None else parse_bytes(budget)
    return whole // STATES


def layer_bytes(model: PreTrainedModel) -> int:
    """Size of the weights of all decoder layers."""
    layers = model.get_submodule(find_decoder(model).path)
    return sum(parameter.numel() * parameter.element_size() for parameter in layers.parameters())


def _hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual; OPT's embeddings may be narrower."""
    return int(model.config.hidden_size)
