"""One run from end to end: calibrate, search, cut, save, reload elsewhere, compare, measure."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.allocation import Achieved, Target
from bonsai_fast.config import PruneConfig
from bonsai_fast.data import Sequences, calibration_sequences, evaluation_sequences
from bonsai_fast.evaluation import check_tasks, evaluate_tasks, perplexity
from bonsai_fast.mask_files import load_mask
from bonsai_fast.methods import METHODS, Compensates, Plan, Search, Task
from bonsai_fast.progress import Reporter
from bonsai_fast.run_directory import open_run
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.streaming import named_weights
from bonsai_fast.surgery import kept_positions, remove_units, save_pretrained, verify_saved
from bonsai_fast.timing import measure_latency
from bonsai_fast.units import Layout

# windows for calibration and evaluation are no longer than this unless asked for
MAX_LENGTH = 4096
EVALUATION_LENGTH = 512
VERIFIED_TOKENS = 64


@dataclass(frozen=True)
class PruneResult:
    """What a run did; plain values, as the command prints them.

    Attributes:
        output: directory of the saved model.
        run: directory of the run.
        sparsity: removed fraction of the decoder's parameters.
        sparsity_total: removed fraction of the whole model's parameters.
        parameters, parameters_dense: of the whole model, after and before.
        dense_perplexity, pruned_perplexity: on text that was not used for calibration.
        protocol: how both perplexities were measured.
        latency: speeds of "dense" and "pruned".
        tasks: zero-shot results of "dense" and "pruned", if any were asked for.
        submodels_scored, tokens_scored: work of the last start; what the ledger held is not
            counted.
        max_logit_difference: the pruned model in memory against the saved one, loaded in a fresh
            process.
        seconds: wall time of the last start.
    """

    output: str
    run: str
    sparsity: float
    sparsity_total: float
    parameters: int
    parameters_dense: int
    dense_perplexity: float
    pruned_perplexity: float
    protocol: dict[str, Any]
    latency: dict[str, dict[str, float]]
    tasks: dict[str, dict[str, dict[str, float]]]
    submodels_scored: int
    tokens_scored: int
    max_logit_difference: float
    seconds: float

    @property
    def keep_mask(self) -> torch.Tensor:
        """bool [P], the units of the run's layout (its attention and sublayers) that were kept."""
        return load_mask(Path(self.run) / "masks" / "final.safetensors").keep


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig | None = None,
    *,
    output_dir: str | Path,
    reporter: Reporter | None = None,
) -> PruneResult:
    """Prune a model, save the result and compare it with its parent.

    Args:
        model: the parent; unchanged when this returns.
        tokenizer: its tokenizer, saved with the result.
        config: what to do; the default configuration if None.
        output_dir: the run's directory. The same call there resumes; another target there, once the
            run has finished, is met from the recorded evaluations alone. The model is saved in its
            folder `model`.
        reporter: where progress is shown; stderr if None.
    Raises:
        ValueError: anything about the request that cannot be met, before any work is done.
        OSError: a file could not be written.
    """
    task, evaluation = prepare(model, tokenizer, config or PruneConfig())
    run = open_run(Path(output_dir), task.config, task.layout, model, task.calibration.sha256)
    return execute(Search(task, run, reporter or Reporter()), tokenizer, evaluation)


def prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PruneConfig
) -> tuple[Task, Sequences]:
    """Check everything that can be refused, before any work is done.

    Returns:
        the task and the text for evaluation.
    Raises:
        ValueError: in one line.
    """
    config = config.resolved()
    check_finite(model)
    if config.tasks is not None:
        check_tasks(config.task_names)
    layout = Layout.of(
        model,
        attention="kv_group" if config.attention == "kv-group" else "head",
        sublayers=config.sublayers,
    )
    target = Target.parse(config.target_text)
    target.removal_budget(layout)  # refuses the impossible
    longest = min(int(getattr(model.config, "max_position_embeddings", MAX_LENGTH)), MAX_LENGTH)
    assert config.num_sequences is not None
    calibration = calibration_sequences(
        config.calibration,
        tokenizer,
        num_sequences=config.num_sequences,
        length=config.sequence_length or longest,
        seed=config.seed,
        model=model,
    )
    evaluation = evaluation_sequences(
        config.evaluation or ("builtin" if config.calibration == "self" else config.calibration),
        tokenizer,
        max_tokens=config.evaluation_tokens,
        length=min(EVALUATION_LENGTH, longest, config.evaluation_tokens),
        calibration=config.calibration,
    )
    scorer = MaskScorer(
        model, layout=layout, route=config.route or "auto", memory_budget=config.memory_budget
    )
    if config.route is not None and scorer.engine.name != "fused":
        raise ValueError(
            f"route: {type(model).__name__} is scored as it is, which leaves no choice; "
            f"expected none, got {config.route}"
        )
    scorer.rows_per_batch(calibration.input_ids.shape[1])  # refuses a budget that is too small
    return Task(model, scorer, calibration, config, target), evaluation


def execute(
    search: Search, tokenizer: PreTrainedTokenizerBase, evaluation: Sequences
) -> PruneResult:
    """Run a prepared task in its run directory."""
    started = time.perf_counter()
    run, reporter = search.run, search.reporter
    if run.start == "finished":
        reporter.note(f"{run.path} is finished; nothing to do")
        return PruneResult(**json.loads((run.path / "run.json").read_text())["result"])
    calibration = search.task.calibration
    reporter.note(
        f"pruning {run.identity['parent']['name']} to {search.task.config.target_text}: "
        f"{len(search.task.layout):,} units, "
        f"calibration on {calibration.source} ({calibration.description})"
    )
    if run.start == "resume":
        reporter.note(f"resuming {run.path}: {len(run.ledger)} recorded evaluations")
    if run.start == "retarget":
        reporter.note(
            f"{run.path} is finished: meeting {search.task.config.target_text} from its ledger"
        )
    keep = METHODS[search.task.config.method].find(search)
    run.save_mask("final", keep)
    _comment(search, keep)
    result = _deliver(search, tokenizer, keep, evaluation, started)
    run.record("finished", result=asdict(result))
    return result


def pruned_model(search: Search, keep: torch.Tensor) -> PreTrainedModel:
    """The smaller model of a keep mask, with whatever its method compensates."""
    smaller = remove_units(search.task.model, search.task.layout, keep)
    method = METHODS[search.task.config.method]
    if isinstance(method, Compensates):
        method.compensate(search, smaller, keep)
    return smaller


def check_finite(model: PreTrainedModel) -> None:
    """Raise ValueError if a weight is NaN or Inf."""
    for name, parameter in named_weights(model):
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"the model's weights hold NaN or Inf, first in {name}")


def _comment(search: Search, keep: torch.Tensor) -> None:
    """Say what a user may want to know of the shape that was reached."""
    task, warn = search.task, search.reporter.warn
    achieved = Achieved.of(task.layout, keep, task.target.removal_budget(task.layout))
    if not achieved.within_tolerance:
        warn(
            f"{achieved.removed:,} parameters go, {achieved.asked:,} were asked for: "
            "the layers allow no finer steps"
        )
    if task.config.round_to == "1":
        warn("widths are not rounded: llama.cpp runs such models slower and quantises them worse")


def _deliver(
    search: Search,
    tokenizer: PreTrainedTokenizerBase,
    keep: torch.Tensor,
    evaluation: Sequences,
    started: float,
) -> PruneResult:
    """Cut, save, reload in a fresh process, compare, measure."""
    task, reporter = search.task, search.reporter
    model, layout = task.model, task.layout
    smaller = pruned_model(search, keep)
    directory = search.run.model_directory
    save_pretrained(
        smaller, directory, tokenizer=tokenizer, report=_report(search, keep), overwrite=True
    )
    reporter.note(f"saved to {directory}; loading it again in a fresh process")
    tokens = evaluation.input_ids[:1, :VERIFIED_TOKENS]
    with torch.inference_mode():
        logits = smaller(input_ids=tokens.to(smaller.device), use_cache=False).logits.float().cpu()
    difference = verify_saved(
        directory, tokens, logits, tolerance=_tolerance(logits, smaller.dtype)
    )
    reporter.note(f"it gives the same logits there (largest difference {difference:.2g})")
    reporter.note(f"measuring perplexity on {evaluation.source}: {evaluation.description}")
    dense, pruned = perplexity(model, evaluation), perplexity(smaller, evaluation)
    reporter.note("measuring latency, dense and pruned in turns")
    latency = measure_latency({"dense": model, "pruned": smaller}, evaluation.input_ids)
    tasks = {}
    if task.config.tasks is not None:
        names = task.config.task_names
        tasks = {
            "dense": evaluate_tasks(model, tokenizer, names),
            "pruned": evaluate_tasks(smaller, tokenizer, names),
        }
    parameters = smaller.num_parameters()
    removed = layout.num_model_parameters - parameters
    return PruneResult(
        output=str(directory),
        run=str(search.run.path),
        sparsity=removed / layout.num_decoder_parameters,
        sparsity_total=removed / layout.num_model_parameters,
        parameters=parameters,
        parameters_dense=layout.num_model_parameters,
        dense_perplexity=dense.value,
        pruned_perplexity=pruned.value,
        protocol=dense.protocol,
        latency={name: asdict(value) for name, value in latency.items()},
        tasks=tasks,
        submodels_scored=search.submodels_scored,
        tokens_scored=search.tokens_scored,
        max_logit_difference=difference,
        seconds=time.perf_counter() - started,
    )


def _tolerance(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest difference that is rounding: the same weights, perhaps other kernels."""
    share = 1e-4 if dtype == torch.float32 else 3e-2
    return share * float(logits.abs().max())


def _report(search: Search, keep: torch.Tensor) -> dict[str, Any]:
    """What bonsai_report.json says: which parts of the parent are left, by layer."""
    config = search.task.config
    kept = kept_positions(search.task.layout, keep)
    return {
        "parent": search.run.identity["parent"],
        **{
            name: getattr(config, name)
            for name in ("target_text", "method", "preset", "head_layout", "round_to", "seed")
        },
        "kept": {str(layer): parts for layer, parts in enumerate(kept)},
    }


def result_table(result: PruneResult) -> Table:
    """The comparison that a person reads at the end."""
    table = Table(title="dense and pruned")
    for column in ("", "dense", "pruned", "change"):
        table.add_column(column, justify="left" if not column else "right")
    dense, pruned = result.latency["dense"], result.latency["pruned"]
    table.add_row(
        "parameters",
        f"{result.parameters_dense:,}",
        f"{result.parameters:,}",
        f"-{result.sparsity_total:.1%} (decoder -{result.sparsity:.2%})",
    )
    ratio = result.pruned_perplexity / result.dense_perplexity
    table.add_row(
        "perplexity",
        f"{result.dense_perplexity:.2f}",
        f"{result.pruned_perplexity:.2f}",
        f"x{ratio:.2f}",
    )
    for name, label in (
        ("prefill_tokens_per_s", "prefill, tokens/s"),
        ("decode_tokens_per_s", "decode, tokens/s"),
    ):
        table.add_row(
            label, f"{dense[name]:.1f}", f"{pruned[name]:.1f}", f"x{pruned[name] / dense[name]:.2f}"
        )
    protocol = result.protocol
    table.caption = (
        f"perplexity: {protocol['dataset']}, {protocol['tokens']:,} predicted tokens, "
        f"window {protocol['window']}, "
        f"stride {protocol['stride']}; speeds: batch 1, medians, measured in turns"
    )
    return table


def plan_table(task: Task, plan: Plan, seconds: float) -> Table:
    """What a run would do, before it does it."""
    layout = task.layout
    table = Table(title=f"plan for {task.config.target_text}", show_header=False)
    kinds = {
        kind: sum(len(group) for group in layout.groups if group.kind == kind)
        for kind in layout.kinds
    }
    budget = task.target.removal_budget(layout)
    table.add_row("units", ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()))
    table.add_row(
        "to remove",
        f"{budget:,} of {layout.num_decoder_parameters:,} decoder parameters "
        f"({budget / layout.num_decoder_parameters:.2%}; "
        f"{budget / layout.num_model_parameters:.2%} of the whole model)",
    )
    table.add_row("calibration", f"{task.calibration.source}: {task.calibration.description}")
    table.add_row("rounds", str(plan.rounds))
    table.add_row("sub-models scored", f"{plan.submodels:,}")
    table.add_row("forward tokens", f"{plan.tokens:,}")
    table.add_row(
        "memory for scoring", f"{task.scorer.memory_budget / 2**20:,.0f} MiB beside the weights"
    )
    table.add_row(
        "time for scoring",
        f"about {seconds / 60:.1f} minutes, from one batch timed on this machine",
    )
    return table


def estimate_seconds(task: Task, plan: Plan) -> float:
    """Time that the plan's forward passes take on this machine, from one batch."""
    tokens = task.calibration.input_ids[:1]
    rows = task.scorer.submodels_per_call(1, tokens.shape[1])
    # all different, or an engine would run them once
    different = torch.rand(rows, len(task.layout), generator=torch.Generator().manual_seed(0)) > 0.1
    task.scorer.score(different[:1], tokens)
    started = time.perf_counter()
    task.scorer.score(different, tokens)
    return (time.perf_counter() - started) / (rows * tokens.shape[1]) * plan.tokens
