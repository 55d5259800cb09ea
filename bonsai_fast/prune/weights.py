"""A run that zeroes weights, from end to end: layer by layer, save, reload elsewhere, compare."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.streaming import exchanged_weights, stream_of
from bonsai_fast.config import PruneConfig
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.perplexity import Perplexity
from bonsai_fast.evaluation.tasks import check_tasks, evaluate_tasks
from bonsai_fast.evaluation.text import calibration_sequences
from bonsai_fast.methods import WEIGHT_METHODS, Choice
from bonsai_fast.methods.weights import check_memory, sweep_perplexity
from bonsai_fast.methods.weights.layer_by_layer import (
    WeightTask,
    linears_by_layer,
    prune_layers,
)
from bonsai_fast.prune.deliver import VERIFIED_TOKENS, logit_tolerance
from bonsai_fast.prune.units import check_finite, evaluation_text, longest_window
from bonsai_fast.report import write_report
from bonsai_fast.runs.directory import WeightRun
from bonsai_fast.surgery import SavedModelError, save_pretrained, verify_saved

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the calibration windows of SparseGPT and Wanda are no longer, whatever the model would take
CALIBRATION_LENGTH = 2048


@dataclass(frozen=True)
class SparseResult:
    """What a run that zeroes weights did; plain values, as the command prints them.

    Attributes:
        output: directory of the saved model, which has its parent's class and shapes.
        run: directory of the run.
        method, pattern: as asked.
        sparsity: zeros among the weights that were pruned: the linear layers of the decoder.
        sparsity_total: all zeros in them among all of the model's parameters.
        weights: how many weights those are.
        zeros, zeros_dense: how many are exactly zero: in the saved model, read again from the disk,
            and in the parent.
        parameters: of the whole model.
        dense_perplexity, pruned_perplexity: on text that was not used for calibration.
        standard_error: of the pruned model's mean loss, in nats.
        protocol: how both perplexities were measured.
        tasks: zero-shot results of "dense" and "pruned", if any were asked for.
        tokens: calibration tokens that layers were run on in the last start, each counted as if
            it had gone through the whole model.
        max_logit_difference: the pruned model in memory against the saved one, loaded in a fresh
            process.
        seconds, pruning_seconds: wall time of the last start, and of finding the weights in it.
    """

    output: str
    run: str
    method: str
    pattern: str
    sparsity: float
    sparsity_total: float
    weights: int
    zeros: int
    zeros_dense: int
    parameters: int
    dense_perplexity: float
    pruned_perplexity: float
    standard_error: float
    protocol: dict[str, Any]
    tasks: dict[str, dict[str, dict[str, float]]]
    tokens: int
    max_logit_difference: float
    seconds: float
    pruning_seconds: float


def prepare_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig,
) -> WeightTask:
    """Check everything that can be refused, before any work is done.

    Raises:
        ValueError: in one line.
    """
    config = config.resolved()
    method = WEIGHT_METHODS[config.method]
    pattern = config.weight_pattern
    update = method.weight_update if config.weight_update is None else config.weight_update
    choice = Choice(pattern, config.compare_within or method.within, update)
    config = replace(
        config,
        sparsity=float(pattern.sparsity),
        pattern=str(pattern).partition(" ")[0],
        compare_within=None if pattern.group else choice.within,
        weight_update=update,
    )
    if stream_of(model) is not None:
        raise ValueError(
            f"method {config.method}: needs the model in memory, but its layers are streamed"
        )
    check_finite(model)
    if config.tasks is not None:
        check_tasks(config.task_names)
    layers = linears_by_layer(model)
    _check_shapes(layers, choice)
    longest = longest_window(model)
    assert config.num_sequences is not None
    calibration = None
    if method.needs(choice) != "nothing":
        calibration = calibration_sequences(
            config.calibration,
            tokenizer,
            num_sequences=config.num_sequences,
            length=min(config.sequence_length or CALIBRATION_LENGTH, longest),
            seed=config.seed,
            model=model,
        )
    evaluation = evaluation_text(config, tokenizer, longest)
    texts = [text for text in (calibration, evaluation) if text is not None]
    longest = max(text.input_ids.shape[1] for text in texts)
    check_memory(model, longest, memory_budget=config.memory_budget)
    return WeightTask(model, tokenizer, config, choice, calibration, evaluation, layers)


def execute_weights(task: WeightTask, run: WeightRun, reporter: Reporter) -> SparseResult:
    """Run a prepared task in its run directory.

    Raises:
        LedgerError: a recorded layer is damaged.
        UnusableInputsError: a layer's inputs hold NaN or Inf, or it has none.
        OSError: something cannot be written.
    """
    started = time.perf_counter()
    if run.start == "finished":
        reporter.note(f"{run.path} is finished; nothing to do")
        run.drop_layers()  # if it was killed just before it did
        return SparseResult(**json.loads((run.path / "run.json").read_text())["result"])
    text = task.calibration
    reporter.note(
        f"pruning {run.identity['parent']['name']}, {task.config.method}, {task.choice.pattern}: "
        f"{sum(linear.weight.numel() for linear in task.linears.values()):,} weights in "
        f"{len(task.layers)} layers, "
        + (f"calibration on {text.source} ({text.description})" if text else "no calibration")
    )
    weights, tokens = _saved_weights(task, run), 0
    if weights is None:
        tokens = prune_layers(task, run, reporter)
        weights = {}
        for number in range(len(task.layers)):
            layer = run.layer(number)
            assert layer is not None, "prune_layers records every layer"
            weights |= layer
    found = time.perf_counter() - started
    dense = _perplexity(task, run, reporter, "the parent's perplexity")
    with _pruned(task, weights):
        pruned = _perplexity(task, run, reporter, "the pruned model's")
        tasks = {}
        if task.config.tasks is not None:
            tasks["pruned"] = evaluate_tasks(task.model, task.tokenizer, task.config.task_names)
        difference = _save(task, run, reporter)
    if task.config.tasks is not None:
        tasks["dense"] = evaluate_tasks(task.model, task.tokenizer, task.config.task_names)
    zeros = count_saved_zeros(run.model_directory, weights)
    num_weights = sum(weight.numel() for weight in weights.values())
    result = SparseResult(
        output=str(run.model_directory),
        run=str(run.path),
        method=task.config.method,
        pattern=str(task.choice.pattern),
        sparsity=zeros / num_weights,
        sparsity_total=zeros / task.model.num_parameters(),
        weights=num_weights,
        zeros=zeros,
        zeros_dense=sum(_zeros(linear.weight) for linear in task.linears.values()),
        parameters=task.model.num_parameters(),
        dense_perplexity=dense.value,
        pruned_perplexity=pruned.value,
        standard_error=pruned.standard_error,
        protocol=dense.protocol,
        tasks=tasks,
        tokens=tokens,
        max_logit_difference=difference,
        seconds=time.perf_counter() - started,
        pruning_seconds=found,
    )
    run.record("finished", result=asdict(result))
    run.drop_layers()
    reporter.note(f"the report is {write_report(run.path)}")
    return result


def count_saved_zeros(directory: Path, weights: dict[str, Tensor]) -> int:
    """Zeros among pruned weights, in a saved model that is read again.

    Raises:
        SavedModelError: it holds other weights than these.
    """
    saved = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    zeros = 0
    for name, weight in weights.items():
        found = saved.get_parameter(name).detach()
        if not torch.equal(found, weight):
            raise SavedModelError(f"{directory} holds other weights than were saved, in {name}")
        zeros += _zeros(found)
    return zeros


def _check_shapes(layers: list[dict[str, nn.Linear]], choice: Choice) -> None:
    group = choice.pattern.group
    for layer in layers:
        for name, linear in layer.items():
            if linear.weight.dtype not in DTYPES:
                raise ValueError(
                    f"{name}: expected float32, bfloat16 or float16, got {linear.weight.dtype}"
                )
            if group is not None and linear.in_features % group:
                raise ValueError(
                    f"pattern {choice.pattern}: expected input widths that {group} divides, "
                    f"got {linear.in_features} in {name}"
                )


def _pruned(task: WeightTask, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Inside, the parent is its own pruned model."""
    by_layer = [{name: weights[name] for name in layer} for layer in task.layers]
    return exchanged_weights(task.model, by_layer.__getitem__)


def _saved_weights(task: WeightTask, run: WeightRun) -> dict[str, Tensor] | None:
    """Of a finished run that is only measured again; None if there is none."""
    if run.start != "retarget" or not (run.model_directory / "config.json").is_file():
        return None
    saved = AutoModelForCausalLM.from_pretrained(run.model_directory, dtype="auto")
    return {name: saved.get_parameter(name).detach() for name in task.linears}


def _perplexity(task: WeightTask, run: WeightRun, reporter: Reporter, what: str) -> Perplexity:
    with reporter.bar(what, total=len(task.layers)) as advance:
        return sweep_perplexity(
            task.model,
            task.evaluation,
            memory_budget=task.config.memory_budget,
            folder=run.path,
            advance=advance,
        )


def _save(task: WeightTask, run: WeightRun, reporter: Reporter) -> float:
    """Save the model as it is, load it elsewhere; returns how much its logits differ there."""
    model, directory = task.model, run.model_directory
    report = {
        "parent": run.identity["parent"],
        "method": task.config.method,
        "pattern": str(task.choice.pattern),
        "compare_within": task.config.compare_within,
        "weight_update": task.choice.weight_update,
        "seed": task.config.seed,
    }
    save_pretrained(model, directory, tokenizer=task.tokenizer, report=report, overwrite=True)
    reporter.note(f"saved to {directory}; loading it again in a fresh process")
    tokens = task.evaluation.input_ids[:1, :VERIFIED_TOKENS]
    with torch.inference_mode():
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits.float().cpu()
    tolerance = logit_tolerance(logits, model.dtype)
    difference = verify_saved(directory, tokens, logits, tolerance=tolerance)
    reporter.note(f"it gives the same logits there (largest difference {difference:.2g})")
    return difference


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))
