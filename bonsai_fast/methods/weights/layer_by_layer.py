"""Prunes the decoder layers of a model one at a time, each on the outputs of those before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.streaming import exchanged_weights, weight
from bonsai_fast.config import ResolvedConfig
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.layerwise import InputRecorder, LinearInputs, Sweep
from bonsai_fast.methods import Choice, WeightMethod
from bonsai_fast.methods.weights.weight_options import WeightOptions
from bonsai_fast.models import UnsupportedModelError, find_decoder
from bonsai_fast.runs.directory import WeightRun


@dataclass(frozen=True)
class WeightTask:
    """What to prune, on which text, and how; all of it has been checked.

    Attributes:
        model, tokenizer: the parent, in memory or streamed.
        config: what was asked for, with the preset filled in.
        method, choice: what it names, and its options.
        calibration: the text that is read; None if the method reads none.
        evaluation: text for perplexity.
        layers: the linear layers of each decoder layer, by the names of their weights. Of a
            streamed model, use `streaming.weight` to read one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: ResolvedConfig[WeightOptions]
    method: WeightMethod
    choice: Choice
    calibration: Sequences | None
    evaluation: Sequences
    layers: list[dict[str, nn.Linear]]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers of all decoder layers."""
        return {name: linear for layer in self.layers for name, linear in layer.items()}


def linears_by_layer(model: PreTrainedModel) -> list[dict[str, nn.Linear]]:
    """The linear layers inside every decoder layer, by the names of their weights.

    Raises:
        UnsupportedModelError: no known decoder, or its layers hold no nn.Linear, as those of GPT-2.
    """
    decoder = find_decoder(model)
    layers = [
        {
            f"{decoder.path}.{number}.{name}.weight": module
            for name, module in model.get_submodule(f"{decoder.path}.{number}").named_modules()
            if isinstance(module, nn.Linear)
        }
        for number in range(decoder.num_layers)
    ]
    if not any(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights to zero: its layers hold no nn.Linear"
        )
    return layers


def prune_layers(task: WeightTask, run: WeightRun, reporter: Reporter) -> int:
    """Prune every decoder layer that is not recorded yet, and record it.

    Returns:
        calibration tokens that layers were run on, as tokens through the whole model.
    """
    num_layers = len(task.layers)
    missing = [number for number in range(num_layers) if not run.layers.has(number)]
    if 0 < len(missing) < num_layers:
        reporter.note(f"resuming {run.path}: {num_layers - len(missing)} layers are recorded")
    if not missing:
        return 0
    sweep, passes = None, 0
    if task.calibration is not None:
        sweep = Sweep(
            task.model,
            task.calibration.input_ids,
            memory_budget=task.config.memory_budget,
            folder=run.path,
        )
    with reporter.bar("layers", total=missing[-1] + 1) as advance:
        for number in range(missing[-1] + 1):
            weights = run.layers.find(number)
            if weights is None:
                weights = prune_layer(task, number, sweep)
                passes += 1
                run.layers.save(number, weights)
            if sweep is not None and number < missing[-1]:
                with exchanged_weights(task.model, {number: weights}.get):
                    sweep.advance(number)
                passes += 1
            advance(1)
    tokens = 0 if task.calibration is None else task.calibration.input_ids.numel()
    return round(passes * tokens / num_layers)


def prune_layer(task: WeightTask, number: int, sweep: Sweep | None) -> dict[str, Tensor]:
    """The pruned weights of a layer, on the CPU.

    Args:
        sweep: the calibration text, at this layer; None if the method reads none.
    """
    method, linears = task.method, task.layers[number]
    inputs: dict[str, LinearInputs] = {}
    if sweep is not None:
        recorder = InputRecorder(linears, method.needs(task.choice))
        with recorder:
            sweep.read(number)
        inputs = {name: recorder.of(name) for name in linears}
    return {
        name: method.prune(weight(task.model, name).detach(), inputs.get(name), task.choice).cpu()
        for name in linears
    }
