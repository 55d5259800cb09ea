"""The decoder layers of a model, pruned one after another as a method over `weights` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.config import PruneConfig
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods import WEIGHT_METHODS, Choice
from bonsai_fast.methods.weights import InputRecorder, LinearInputs, Sweep, exchanged, resident
from bonsai_fast.models import find_decoder
from bonsai_fast.runs.directory import WeightRun


@dataclass(frozen=True)
class WeightTask:
    """What is to be pruned, on which text, and how; everything in it has been checked.

    Attributes:
        model, tokenizer: the parent, which may lie elsewhere than on `device`.
        config: resolved configuration.
        choice: what it says to the method.
        calibration: the text that is read; None if the method reads none.
        evaluation: text for perplexity.
        device: where layers are computed.
        layers: the linear layers of each decoder layer, by the names of their weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PruneConfig
    choice: Choice
    calibration: Sequences | None
    evaluation: Sequences
    device: torch.device
    layers: list[dict[str, nn.Linear]]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """All of them."""
        return {name: linear for layer in self.layers for name, linear in layer.items()}


def linears_by_layer(model: PreTrainedModel) -> list[dict[str, nn.Linear]]:
    """The linear layers inside every decoder layer, by the names of their weights.

    Raises:
        UnsupportedModelError: the model has no decoder that we know.
    """
    decoder = find_decoder(model)
    return [
        {
            f"{decoder.path}.{number}.{name}.weight": module
            for name, module in model.get_submodule(f"{decoder.path}.{number}").named_modules()
            if isinstance(module, nn.Linear)
        }
        for number in range(decoder.num_layers)
    ]


def prune_layers(task: WeightTask, run: WeightRun, reporter: Reporter) -> int:
    """Prune every decoder layer that is not on record, on what the pruned ones before it hand on.

    Returns:
        how many tokens' worth of forward passes through the whole model that took.
    """
    num_layers = len(task.layers)
    missing = [number for number in range(num_layers) if not run.has_layer(number)]
    if 0 < len(missing) < num_layers:
        reporter.note(f"resuming {run.path}: {num_layers - len(missing)} layers are on record")
    if not missing:
        return 0
    sweep, passes = None, 0
    if task.calibration is not None:
        sweep = Sweep(
            task.model,
            task.calibration.input_ids,
            device=task.device,
            memory_budget=task.config.memory_budget,
            folder=run.path,
        )
    with reporter.bar("layers", total=missing[-1] + 1) as advance:
        for number in range(missing[-1] + 1):
            weights = run.layer(number)
            if weights is None:
                weights = prune_layer(task, number, sweep)
                passes += 1
                run.save_layer(number, weights)
            if sweep is not None and number < missing[-1]:
                with exchanged_weights(task.layers[number], weights):
                    sweep.advance(number)
                passes += 1
            advance(1)
    tokens = 0 if task.calibration is None else task.calibration.input_ids.numel()
    return round(passes * tokens / num_layers)


def prune_layer(task: WeightTask, number: int, sweep: Sweep | None) -> dict[str, Tensor]:
    """The pruned weights of a layer, on the CPU, from the text that waits in front of it."""
    method, linears = WEIGHT_METHODS[task.config.method], task.layers[number]
    inputs: dict[str, LinearInputs] = {}
    if sweep is not None:
        recorder = InputRecorder(linears, method.needs(task.choice))
        with recorder:
            sweep.read(number)
        inputs = {name: recorder.of(name) for name in linears}
    pruned = {}
    for name, linear in linears.items():
        with resident(linear, task.device):
            weight = linear.weight.detach()
            pruned[name] = method.prune(weight, inputs.get(name), task.choice).cpu()
    return pruned


def exchanged_weights(
    linears: dict[str, nn.Linear], weights: dict[str, Tensor]
) -> AbstractContextManager[None]:
    """Inside, linear layers have other weights; both by name, on any device."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for name, linear in linears.items():
            yield linear.weight, weights[name].to(linear.weight.device)

    return exchanged(pairs())
