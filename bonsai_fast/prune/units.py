"""A run that removes units: check the request, search, cut, deliver."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.config import PruneConfig
from bonsai_fast.delivery.deliver import deliver, drop_recovery
from bonsai_fast.delivery.model_result import recorded_result
from bonsai_fast.delivery.pruned_model import PrunedModel, SlicedModel, SmallerModel
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.evaluation.text import longest_window
from bonsai_fast.methods import METHODS, Compensates, Search, Task, resolve
from bonsai_fast.methods.allocation import Achieved, Target
from bonsai_fast.models.layout import Layout
from bonsai_fast.prune.precision import report_precision
from bonsai_fast.prune.request_checks import (
    calibration_text,
    check_model,
    check_units,
    evaluation_text,
)
from bonsai_fast.prune.result_checks import check_not_empty, check_result
from bonsai_fast.prune.run_result import PruneResult, record_result
from bonsai_fast.recovery.recover_model import Recovery
from bonsai_fast.runs.mask_files import load_mask
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.surgery import kept_positions, remove_units


def prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: PruneConfig
) -> Task[Any]:
    """Check the whole request, before any work is done.

    Raises:
        ValueError: the request cannot be met; one line.
    """
    config = resolve(request)
    options = config.options
    check_model(model, tokenizer, config)
    layout = Layout.of(
        model, attention=options.attention, experts=options.experts, sublayers=options.sublayers
    )
    check_not_empty(model, layout)
    check_units(model, layout, config)
    budget = Target.parse(config.target_text).removal_budget(layout)  # refuses the impossible
    check_result(model, layout, options, budget)
    length = config.sequence_length or longest_window(model)
    calibration = calibration_text(config, tokenizer, model, length)
    evaluation = evaluation_text(config, tokenizer, model)
    scorer = MaskScorer(
        model,
        layout=layout,
        route=options.route,
        precision=options.precision,
        memory_budget=config.memory_budget,
    )
    scorer.rows_per_batch(calibration.input_ids.shape[1])  # refuses a budget that is too small
    return Task(
        model,
        tokenizer,
        scorer,
        calibration,
        evaluation,
        config,
        METHODS[config.method],
        budget,
    )


def execute(search: Search[Any], recovery: Recovery | None, left_out: str = "") -> PruneResult:
    """Run a prepared task in its run directory.

    Args:
        search: a start of the run.
        recovery: what follows pruning; None: nothing.
        left_out: why there is no recovery where the preset has one.
    Raises:
        NotRecordedError: a finished run is asked for something that needs scoring.
        OSError: a file cannot be written.
        SavedModelError: the saved model gives other logits.
    """
    started = time.perf_counter()
    task, run, reporter = search.task, search.run, search.reporter
    if run.start == "finished":
        drop_recovery(run)  # in case the last start was killed just before it did
        return recorded_result(run, PruneResult, reporter)
    _announce(search)
    warnings_before = len(reporter.warnings)
    if left_out:
        reporter.warn(left_out)
    if task.options.precision != "full" and run.start == "new":
        report_precision(task, reporter)
    with PeakMemory(task.model.device) as peak:
        keep = task.method.find(search)
    rounds = list(run.saved_masks)
    run.save_mask("final", keep)
    _warn_about_shape(search, keep)
    delivery = deliver(
        _pruned(search, keep),
        run,
        task.evaluation,
        recovery=recovery,
        report=_report(task, keep),
        tasks=task.config.task_names,
    )
    removed = task.layout.num_model_parameters - delivery.parameters
    result = PruneResult(
        **delivery.as_result(run),
        sparsity=removed / task.layout.num_decoder_parameters,
        sparsity_total=removed / task.layout.num_model_parameters,
        parameters_dense=task.layout.num_model_parameters,
        latency=delivery.latency,
        submodels_scored=search.submodels_scored,
        tokens_scored=search.tokens_scored,
        rounds=_trajectory(search, rounds, keep),
        peak_bytes=peak.bytes,
        warnings=reporter.warnings[warnings_before:],
        seconds=time.perf_counter() - started,
    )
    record_result(run, result, reporter)
    drop_recovery(run)
    return result


def pruned_model(search: Search[Any], keep: torch.Tensor) -> PreTrainedModel:
    """The smaller model of a keep mask bool [P], with what its method compensates for."""
    smaller = remove_units(search.task.model, search.task.layout, keep)
    method = search.task.method
    if isinstance(method, Compensates):
        method.compensate(search, smaller, keep)
    return smaller


def _pruned(search: Search[Any], keep: torch.Tensor) -> PrunedModel:
    model, stream = search.task.model, stream_of(search.task.model)
    common = (model, search.task.tokenizer, search.run.model_directory, search.reporter)
    if stream is None:
        return SmallerModel(*common, pruned_model(search, keep))
    assert stream.origin is not None  # `prepare` refuses it
    return SlicedModel(*common, search.task.layout, keep, stream.origin)


def _announce(search: Search[Any]) -> None:
    """Say what is pruned, on which text, and what is already recorded."""
    task, run, note = search.task, search.run, search.reporter.note
    note(
        f"pruning {run.identity['parent']['name']} to {task.config.target_text}: "
        f"{len(task.layout):,} units, "
        f"calibration on {task.calibration.source} ({task.calibration.description})"
    )
    if run.start == "resume":
        note(f"resuming {run.path}: {len(run.ledger)} recorded evaluations")
    if run.start == "retarget":
        note(
            f"{run.path} is finished: selecting again for {task.config.target_text} "
            "from its recorded scores"
        )


def _warn_about_shape(search: Search[Any], keep: torch.Tensor) -> None:
    """Warn of a missed target and of widths that engines run slowly."""
    task, warn = search.task, search.reporter.warn
    achieved = Achieved.of(task.layout, keep, task.budget)
    if not achieved.within_tolerance:
        warn(
            f"{achieved.removed:,} parameters are removed, {achieved.asked:,} were requested: "
            "whole units and rounded widths allow no closer match"
        )
    if task.options.round_to == "1":
        warn("widths are not rounded: llama.cpp runs such models slower and quantises them worse")


def _trajectory(search: Search[Any], names: list[str], final: torch.Tensor) -> list[dict[str, Any]]:
    """Perplexity after each round, measured on sub-models of the parent."""
    task, found = search.task, []
    for name in names:
        mask = load_mask(search.run.path / "masks" / f"{name}.safetensors")
        if torch.equal(mask.keep, final):
            continue
        search.reporter.note(f"measuring perplexity of {name}")
        loss = task.scorer.score(mask.keep[None], task.evaluation.input_ids).double().mean()
        found.append(
            {
                "name": name,
                "sparsity": mask.removed / task.layout.num_decoder_parameters,
                "perplexity": float(loss.exp()),
            }
        )
    return found


def _report(task: Task[Any], keep: torch.Tensor) -> dict[str, Any]:
    """What bonsai_report.json says: the request, and what is kept in each layer."""
    values = task.config.values()
    names = ("method", "preset", "head_layout", "round_to", "seed")
    return {
        "target_text": task.config.target_text,
        **{name: values[name] for name in names},
        "kept": {str(layer): x for layer, x in enumerate(kept_positions(task.layout, keep))},
    }
