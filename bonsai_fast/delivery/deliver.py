"""Save a pruned model, load it again, compare and measure; the same steps for all methods."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import Any

from bonsai_fast.delivery.pruned_model import CUT, PrunedModel
from bonsai_fast.delivery.recover_step import FOLDER, RecoveryResult, recover_pruned
from bonsai_fast.evaluation.completions import complete, save_completions
from bonsai_fast.evaluation.perplexity import Perplexity
from bonsai_fast.evaluation.tasks import evaluate_tasks
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.latency.timing import Workload, measure_latency
from bonsai_fast.recovery.recover_model import Recovery
from bonsai_fast.runs.directory import Run
from bonsai_fast.surgery.model_card import record_measurements

VERIFIED_TOKENS = 64


@dataclass(frozen=True)
class Delivery:
    """Measurements of a saved model and its parent.

    Attributes:
        parameters: number of parameters of the saved model.
        dense, pruned: perplexities.
        latency: speeds of "dense" and "pruned"; empty where `PrunedModel.measures_speed` is not
            set.
        tasks: zero-shot results of both, if tasks were given.
        max_logit_difference: between the logits of the pruned model and of the saved one.
        recovery: what recovery did; None if there was none.
    """

    parameters: int
    dense: Perplexity
    pruned: Perplexity
    latency: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, dict[str, float]]]
    max_logit_difference: float
    recovery: RecoveryResult | None

    def as_result(self, run: Run) -> dict[str, Any]:
        """The fields of `RunResult` that are known by now."""
        return {
            "output": str(run.model_directory),
            "run": str(run.path),
            "parameters": self.parameters,
            "dense_perplexity": self.dense.value,
            "pruned_perplexity": self.pruned.value,
            "protocol": self.dense.protocol,
            "tasks": self.tasks,
            "max_logit_difference": self.max_logit_difference,
            "recovery": None if self.recovery is None else asdict(self.recovery),
        }


def deliver(
    model: PrunedModel,
    run: Run,
    evaluation: Sequences,
    *,
    recovery: Recovery | None,
    report: dict[str, Any],
    tasks: list[str],
) -> Delivery:
    """Recover, save, load again, compare logits, measure, and write all that into the model card.

    Args:
        model: the pruned model.
        run: directory of the run.
        evaluation: text for perplexity.
        recovery: what follows pruning; None: nothing.
        report: what bonsai_report.json says beside the parent.
        tasks: zero-shot tasks, perhaps none.
    Raises:
        OSError: the model cannot be saved.
        SavedModelError: the saved model gives other logits.
    """
    note = model.reporter.note
    recovered = None
    if recovery is not None:
        model, recovered = recover_pruned(model, recovery, evaluation)
    if recovered is not None:
        report = {**report, "recovery": recovered.for_card()}
    model.save({"parent": run.identity["parent"], **report})
    note(f"saved to {model.directory}; loading it again to compare its logits")
    difference = model.check(evaluation.input_ids[:1, :VERIFIED_TOKENS])
    note(f"the saved model gives the same logits (largest difference {difference:.2g})")
    note(f"measuring perplexity on {evaluation.source}: {evaluation.description}")
    parent, latency, found = model.parent, {}, {}
    dense = model.perplexity(parent, evaluation, "dense")
    with model.pruned() as smaller:
        parameters = smaller.num_parameters()
        pruned = model.perplexity(smaller, evaluation, "pruned")
        if model.measures_speed:
            note("measuring latency of both models, alternately")
            models = {"dense": parent, "pruned": smaller}
            speeds = measure_latency(models, Workload.fitting(models))
            latency = {name: asdict(speed) for name, speed in speeds.items()}
            save_completions(run.path, complete(parent, smaller, model.tokenizer))
        if tasks:
            found["pruned"] = evaluate_tasks(smaller, model.tokenizer, tasks)
    if tasks:
        found["dense"] = evaluate_tasks(parent, model.tokenizer, tasks)
    measured = {
        "parameters_dense": parent.num_parameters(),
        "dense_perplexity": dense.value,
        "pruned_perplexity": pruned.value,
        "protocol": dense.protocol,
    }
    record_measurements(run.model_directory, measured)
    return Delivery(parameters, dense, pruned, latency, found, difference, recovered)


def drop_recovery(run: Run) -> None:
    """Delete what recovery recorded: the saved model holds it."""
    for name in (FOLDER, CUT):
        shutil.rmtree(run.path / name, ignore_errors=True)
