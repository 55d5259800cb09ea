"""A run that zeroes weights: check the request, prune layer by layer, deliver."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.streaming import open_streamed, weight
from bonsai_fast.config import PruneConfig
from bonsai_fast.console import Reporter
from bonsai_fast.delivery.deliver import deliver, drop_recovery
from bonsai_fast.delivery.model_result import recorded_result
from bonsai_fast.delivery.pruned_model import ZeroedModel
from bonsai_fast.delivery.recover_step import recovery_of
from bonsai_fast.evaluation.text import longest_window
from bonsai_fast.layerwise import check_memory
from bonsai_fast.methods import WEIGHT_METHODS, Choice, resolve
from bonsai_fast.methods.weights.layer_by_layer import WeightTask, linears_by_layer, prune_layers
from bonsai_fast.models.experts import holds_experts
from bonsai_fast.prune.request_checks import (
    calibration_text,
    check_model,
    evaluation_text,
)
from bonsai_fast.prune.run_result import SparseResult, record_result
from bonsai_fast.recovery.recover_model import Recovery
from bonsai_fast.runs.directory import WeightRun
from bonsai_fast.surgery import SavedModelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# SparseGPT and Wanda calibrate on windows of this length at most
CALIBRATION_LENGTH = 2048


def prepare_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: PruneConfig,
) -> WeightTask:
    """Check the whole request, before any work is done.

    Raises:
        ValueError: the request cannot be met; one line.
    """
    config = resolve(request)
    method = WEIGHT_METHODS[config.method]
    choice = Choice.of(config)
    check_model(model, tokenizer, config)
    if any(map(holds_experts, model.modules())):
        raise ValueError(
            f"method {config.method}: it zeroes weights of linear layers, and most weights of "
            f"{type(model).__name__} belong to experts, which are none; use a method that removes "
            "units, such as reap"
        )
    layers = linears_by_layer(model)
    _check_shapes(layers, choice)
    calibration = None
    if method.needs(choice) != "nothing":
        length = min(config.sequence_length or CALIBRATION_LENGTH, longest_window(model))
        calibration = calibration_text(config, tokenizer, model, length)
    evaluation = evaluation_text(config, tokenizer, model)
    texts = [text for text in (calibration, evaluation) if text is not None]
    longest = max(text.input_ids.shape[1] for text in texts)
    check_memory(model, longest, memory_budget=config.memory_budget)
    return WeightTask(model, tokenizer, config, method, choice, calibration, evaluation, layers)


def weight_recovery_of(task: WeightTask) -> Recovery | None:
    """The recovery that a request asks for; None if it asks for none.

    Raises:
        ValueError: as `recovery_of`.
    """
    config, model = task.config, task.model
    if config.recover == "none":
        return None
    text = task.calibration
    if text is None:  # the method reads none
        length = min(config.sequence_length or CALIBRATION_LENGTH, longest_window(model))
        text = calibration_text(config, task.tokenizer, model, length)
    return recovery_of(config, model, task.tokenizer, text, task.evaluation, zeros=True)


def execute_weights(
    task: WeightTask, run: WeightRun, reporter: Reporter, recovery: Recovery | None
) -> SparseResult:
    """Run a prepared task in its run directory.

    The pruned weights stay on record if the saved model holds others, made by recovery.

    Args:
        task, run: what to do and where.
        reporter: shows progress.
        recovery: what follows pruning; None: nothing.
    Raises:
        LedgerError: a recorded layer is damaged.
        UnusableInputsError: a layer's inputs hold NaN or Inf, or it has none.
        OSError: a file cannot be written.
        SavedModelError: the saved model gives other logits, or holds other weights.
    """
    started = time.perf_counter()
    if run.start == "finished":
        _drop(run, recovery)  # in case the last start was killed just before it did
        return recorded_result(run, SparseResult, reporter)
    text, model = task.calibration, task.model
    reporter.note(
        f"pruning {run.identity['parent']['name']}, {task.config.method}, {task.choice.pattern}: "
        f"{sum(linear.weight.numel() for linear in task.linears.values()):,} weights in "
        f"{len(task.layers)} layers, "
        + (f"calibration on {text.source} ({text.description})" if text else "no calibration")
    )
    if run.start == "retarget":
        _restore_layers(task, run)
    tokens = prune_layers(task, run, reporter)
    found = time.perf_counter() - started
    delivery = deliver(
        ZeroedModel(
            model,
            task.tokenizer,
            run.model_directory,
            reporter,
            run.layers.__getitem__,
            task.config.memory_budget,
        ),
        run,
        task.evaluation,
        recovery=recovery,
        report={
            "method": task.config.method,
            "pattern": str(task.choice.pattern),
            "compare_within": None if task.choice.pattern.group else task.choice.within,
            "weight_update": task.choice.weight_update,
            "seed": task.config.seed,
        },
        tasks=task.config.task_names,
    )
    zeros = count_saved_zeros(task, run, exact=recovery is None)
    num_weights = sum(linear.weight.numel() for linear in task.linears.values())
    result = SparseResult(
        **delivery.as_result(run),
        method=task.config.method,
        pattern=str(task.choice.pattern),
        sparsity=zeros / num_weights,
        sparsity_total=zeros / delivery.parameters,
        weights=num_weights,
        zeros=zeros,
        zeros_dense=sum(_zeros(weight(model, name)) for name in task.linears),
        standard_error=delivery.pruned.standard_error,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        pruning_seconds=found,
    )
    record_result(run, result, reporter)
    _drop(run, recovery)
    return result


def count_saved_zeros(task: WeightTask, run: WeightRun, *, exact: bool) -> int:
    """Zeros among the pruned weights, in the saved model read from disk again.

    Args:
        task, run: what was done and where.
        exact: whether the saved weights shall be the recorded ones; else only zeros stay zeros.
    Raises:
        SavedModelError: the saved model holds other weights than the record of a layer.
    """
    saved, zeros = open_streamed(run.model_directory, device="cpu"), 0
    for number in range(len(task.layers)):
        for name, pruned in run.layers[number].items():
            found = weight(saved, name).detach()
            if not exact:
                lost = int(torch.count_nonzero(found[pruned == 0]))
                if lost:
                    raise SavedModelError(
                        f"{run.model_directory}: recovery left {lost:,} of the zeroed weights "
                        f"other than zero, in {name}"
                    )
            elif not torch.equal(found, pruned):
                raise SavedModelError(
                    f"{run.model_directory} holds other weights than were saved, in {name}"
                )
            zeros += _zeros(found)
    return zeros


def _drop(run: WeightRun, recovery: Recovery | None) -> None:
    """Delete what the saved model holds."""
    drop_recovery(run)
    if recovery is None:
        run.layers.drop()


def _restore_layers(task: WeightTask, run: WeightRun) -> None:
    """Record the layers of a finished run again, from its saved model, if it has one."""
    if run.layers.has(0) or not (run.model_directory / "config.json").is_file():
        return
    saved = open_streamed(run.model_directory, device="cpu")
    for number, layer in enumerate(task.layers):
        run.layers.save(number, {name: weight(saved, name).detach().clone() for name in layer})


def _check_shapes(layers: list[dict[str, nn.Linear]], choice: Choice) -> None:
    group = choice.pattern.group
    for name, linear in (pair for layer in layers for pair in layer.items()):
        if linear.weight.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected float32, bfloat16 or float16, got {linear.weight.dtype}"
            )
        if group is not None and linear.in_features % group:
            raise ValueError(
                f"pattern {choice.pattern}: expected input widths that {group} divides, "
                f"got {linear.in_features} in {name}"
            )


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))
