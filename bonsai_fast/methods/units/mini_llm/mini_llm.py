"""Method "mini-llm": one shot, by weight times gradient times activation, without a backward pass.

There is no public code. From the paper: the score of a weight is |W g X|. The gradient g is
estimated from two losses with all weights perturbed at once, in one direction (n = 1) or as the
mean over n. The importance of a unit is the largest of its coupled structures, each the sum over
its weights. The first four and last three layers are spared. 10 sequences are used for the
gradient, all for the activations. Units compare inside their layer.

Decided here: only prunable weights are perturbed, since the others would only add noise. X is the
root mean square of an input column over all tokens. The scale of perturbations is 1e-3. Spared
layers are pruned if the target cannot be met otherwise. The paper prints the estimate as a division
by z ("weights-divided"), which for normal z has no mean; multiplying by z ("weights") is unbiased.
In both cases one direction has the same factor for all weights, so that it ranks them as |W z X|
does: only more directions tell more about the loss.

"gates" perturbs one factor for each unit, or block of channels, instead of all weights: far fewer
unknowns for the same two losses. The score is the size of the gate's gradient.

Source: MINI-LLM: equations 6 to 9, algorithm 1, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import cast

import torch
from torch import nn

from bonsai_fast.methods.allocation import equal_shares
from bonsai_fast.methods.importance.coupled import coupled_importance
from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.mini_llm.mini_llm_options import MINI_LLM_PRESETS, MiniLLMOptions
from bonsai_fast.methods.units.mini_llm.spsa import (
    Directions,
    perturbed_weights,
    prunable_weights,
    scaled_gates,
)
from bonsai_fast.methods.units.one_shot import cut
from bonsai_fast.methods.units.variables import Variables
from bonsai_fast.models import Cut
from bonsai_fast.ops.native import channel_moments
from bonsai_fast.scoring import Chunk, SequenceNLL
from bonsai_fast.scoring.sequence_nll import evaluation_mode

# calibration sequences that the gradient is estimated on
SEQUENCES = 10
GATES = "gates"

# (direction, scale) -> inside, the model is perturbed
Perturbed = Callable[[int, float], AbstractContextManager[None]]


class MiniLLM:
    """Two losses for each direction, the activations, and a selection."""

    presets = MINI_LLM_PRESETS

    def plan(self, task: Task[MiniLLMOptions]) -> Plan:
        """Two perturbed models for each direction, and a pass for the activations."""
        submodels, input_ids = 2 * task.options.directions, task.calibration.input_ids
        tokens = submodels * input_ids[:SEQUENCES].numel()
        return Plan(1, submodels, tokens + input_ids.numel())

    def find(self, search: Search[MiniLLMOptions]) -> torch.Tensor:
        """The units to keep, bool [P]."""
        task, layout = search.task, search.task.layout
        everything = torch.ones(len(layout), dtype=torch.bool)
        if task.options.perturbation == GATES:
            prior = search.prior(
                task.options.prior, "parent", everything, task.calibration.input_ids
            )
            importance = gate_sensitivity(search, prior)
        else:
            importance = weight_sensitivity(search)
        return cut(search, equal_shares(layout, importance), task.budget)


def weight_sensitivity(search: Search[MiniLLMOptions]) -> torch.Tensor:
    """Largest sum of |W g X| over the coupled structures of every unit, float64 [P]."""
    task = search.task
    model, layout = task.model, task.layout
    directions = Directions(prunable_weights(layout), task.config.seed)

    def perturbed(number: int, scale: float) -> AbstractContextManager[None]:
        return perturbed_weights(model, layout, directions, number, scale)

    slopes = _slopes(search, perturbed)

    def of_cut(found: Cut) -> torch.Tensor:
        weight = model.get_parameter(found.parameter).detach()
        gradient = torch.zeros_like(weight, dtype=torch.float32)
        for number, slope in enumerate(slopes):
            z = directions.draw(number, found.parameter, weight.shape, weight.device)
            if task.options.perturbation == "weights-divided":
                z = z.reciprocal()
            gradient.add_(z, alpha=slope / len(slopes))
        score = (gradient * weight).abs()
        if weight.dim() == 1:
            return score  # a bias reads ones
        path = found.parameter.removesuffix(".weight")
        score = score * norms[path].to(score.device, score.dtype)
        return score.sum(dim=1 - found.dim, dtype=torch.float64)

    def measure() -> torch.Tensor:
        return coupled_importance(layout, of_cut, reduction="max")

    input_ids = task.calibration.input_ids
    norms = search.measured("activations", lambda: _input_norms(task), input_ids.numel())
    return search.importance("sensitivity", measure, 0)


def gate_sensitivity(search: Search[MiniLLMOptions], prior: torch.Tensor) -> torch.Tensor:
    """Size of the estimated gradient by each unit's gate, float64 [P].

    The prior ranks units that share a gate.
    """
    task = search.task
    variables = Variables.of(task.layout, task.options.granularity, prior)
    directions = Directions([GATES], task.config.seed)
    count, cpu = len(variables.costs), torch.device("cpu")

    def perturbed(number: int, scale: float) -> AbstractContextManager[None]:
        z = directions.draw(number, GATES, (count,), cpu)
        return scaled_gates(task.model, task.layout, (1.0 + scale * z)[variables.of_unit])

    gradient = torch.zeros(count, dtype=torch.float64)
    slopes = _slopes(search, perturbed)
    for number, slope in enumerate(slopes):
        gradient += slope / len(slopes) * directions.draw(number, GATES, (count,), cpu)
    share = equal_shares(task.layout, prior) / task.layout.num_parameters_per_unit
    tie = 1e-9 * gradient.abs().max()
    return gradient.abs()[variables.of_unit] + tie * share


def _slopes(search: Search[MiniLLMOptions], perturbed: Perturbed) -> list[float]:
    """(L(x + e z) - L(x - e z)) / 2e for every direction, from recorded losses."""
    task, options = search.task, search.task.options
    scale = options.scale
    input_ids = task.calibration.input_ids[:SEQUENCES]
    nll = SequenceNLL(task.model)
    batches = input_ids.split(task.scorer.rows_per_batch(input_ids.shape[1]))
    session = task.scorer.session(input_ids)

    def loss(number: int, step: float) -> float:
        def evaluate(_: Chunk) -> torch.Tensor:
            with evaluation_mode(task.model), perturbed(number, step):
                return torch.cat(
                    [nll(batch.to(nll.head.weight.device)).cpu() for batch in batches]
                )[None]

        everything = torch.ones(1, len(task.layout), dtype=torch.bool)
        measure = (
            f"{options.perturbation}, seed {task.config.seed}, direction {number}, {step:+g}: "
        )
        stage = f"direction-{number:05d}"
        found = search.evaluations(measure, evaluate, stage, everything, session, silent=True)
        return float(found.mean(dtype=torch.float64))

    slopes = []
    with search.reporter.bar("directions", total=options.directions) as advance:
        for number in range(options.directions):
            slope = (loss(number, scale) - loss(number, -scale)) / (2 * scale)
            # a direction in which the model overflows does not count
            slopes.append(slope if math.isfinite(slope) else 0.0)
            advance(1)
    return slopes


def _input_norms(task: Task[MiniLLMOptions]) -> dict[str, torch.Tensor]:
    """Root mean square of every input column of every prunable projection, by path."""
    model, input_ids = task.model, task.calibration.input_ids
    weights = [name for name in prunable_weights(task.layout) if name.endswith(".weight")]
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def recorder(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            states = inputs[0].reshape(-1, inputs[0].shape[-1])
            squares = channel_moments(states).sum_of_squares.cpu()
            sums[path] = sums.get(path, 0.0) + squares
            counts[path] = counts.get(path, 0) + len(states)

        return hook

    nll = SequenceNLL(model)
    with ExitStack() as stack:
        for name in weights:
            path = name.removesuffix(".weight")
            module = cast(nn.Linear, model.get_submodule(path))
            stack.callback(module.register_forward_pre_hook(recorder(path)).remove)
        with evaluation_mode(model):
            for batch in input_ids.split(task.scorer.rows_per_batch(input_ids.shape[1])):
                nll(batch.to(nll.head.weight.device))
    return {path: (total / counts[path]).sqrt() for path, total in sums.items()}
