"""Small tasks for methods that zero weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer
from transformers import PreTrainedModel

from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods import WEIGHT_METHODS, Choice, configure, resolve
from bonsai_fast.methods.weights.layer_by_layer import WeightTask, linears_by_layer, prune_layers
from bonsai_fast.runs.directory import WeightRun, open_weight_run


def random_text(vocabulary: int, sequences: int = 5, length: int = 12) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary, (sequences, length), generator=generator)
    return Sequences(input_ids, "random", "random tokens")


def task_of(model: PreTrainedModel, text: Sequences | None = None, **options: Any) -> WeightTask:
    """A task on text, or on random tokens of the model's vocabulary."""
    config = resolve(configure(**options))
    method = WEIGHT_METHODS[config.method]
    choice = Choice.of(config)
    text = text or random_text(model.config.vocab_size)
    calibration = None if method.needs(choice) == "nothing" else text
    layers = linears_by_layer(model)
    return WeightTask(model, byte_tokenizer(), config, method, choice, calibration, text, layers)


def pruned_run(task: WeightTask, folder: Path) -> WeightRun:
    """A run in which all layers are pruned and on record."""
    run = open_weight_run(folder, task.config, task.model, None)
    prune_layers(task, run, Reporter(quiet=True))
    return run


def pruned_weights(task: WeightTask, folder: Path) -> dict[str, torch.Tensor]:
    """The pruned weights of all linear layers of a task."""
    run, weights = pruned_run(task, folder), {}
    for number in range(len(task.layers)):
        layer = run.layers.find(number)
        assert layer is not None
        weights |= layer
    return weights
