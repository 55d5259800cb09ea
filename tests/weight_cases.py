"""Small tasks for methods that zero weights."""

from __future__ import annotations

from typing import Any

import torch
from tiny import byte_tokenizer
from transformers import PreTrainedModel

from bonsai_fast.config import PruneConfig
from bonsai_fast.data import Sequences
from bonsai_fast.methods import WEIGHT_METHODS, Choice
from bonsai_fast.weight_pipeline import WeightTask, linears_by_layer


def random_text(vocabulary: int, sequences: int = 5, length: int = 12) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary, (sequences, length), generator=generator)
    return Sequences(input_ids, "random", "random tokens")


def task_of(model: PreTrainedModel, **options: Any) -> WeightTask:
    """A task on random tokens of the model's vocabulary."""
    config = PruneConfig(**options).resolved()
    method = WEIGHT_METHODS[config.method]
    update = method.weight_update if config.weight_update is None else config.weight_update
    choice = Choice(config.weight_pattern, config.compare_within or method.within, update)
    text = random_text(model.config.vocab_size)
    calibration = None if method.needs(choice) == "nothing" else text
    layers = linears_by_layer(model)
    return WeightTask(
        model, byte_tokenizer(), config, choice, calibration, text, model.device, layers
    )
