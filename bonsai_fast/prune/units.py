"""One run from end to end: calibrate, search, cut, save, reload elsewhere, compare, measure."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.streaming import named_weights, stream_of
from bonsai_fast.config import PruneConfig
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.evaluation.tasks import check_tasks
from bonsai_fast.evaluation.text import Sequences, calibration_sequences, evaluation_sequences
from bonsai_fast.methods import METHODS, Search, Task
from bonsai_fast.methods.allocation import Achieved, Target
from bonsai_fast.models.layout import Layout
from bonsai_fast.prune.deliver import Delivery, deliver
from bonsai_fast.prune.precision import check_precision
from bonsai_fast.report import write_report
from bonsai_fast.runs.mask_files import load_mask
from bonsai_fast.scoring import MaskScorer

# windows for calibration and evaluation are no longer than this unless asked for
MAX_LENGTH = 4096
EVALUATION_LENGTH = 512
# methods that differentiate, perturb or change the model itself
NEED_THE_MODEL = ("flap", "mini-llm", "taylor")
# what precisions are compared on
CHECKED_SUBMODELS, CHECKED_SEQUENCES = 12, 2


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
        latency: speeds of "dense" and "pruned"; empty if the model was streamed.
        tasks: zero-shot results of "dense" and "pruned", if any were asked for.
        submodels_scored, tokens_scored: work of the last start; what the ledger held is not
            counted.
        max_logit_difference: the pruned model in memory against the saved one, loaded in a fresh
            process; of a streamed model, the masked parent against the saved one.
        seconds: wall time of the last start.
        rounds: name, sparsity and perplexity of what each round before the last one left.
        peak_bytes: memory of the search beside the weights, in the last start; None where it cannot
            be measured.
        warnings: what the last start warned of.
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
    latency: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, dict[str, float]]]
    submodels_scored: int
    tokens_scored: int
    max_logit_difference: float
    seconds: float
    rounds: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def keep_mask(self) -> torch.Tensor:
        """bool [P], the units of the run's layout (its attention and sublayers) that were kept."""
        return load_mask(Path(self.run) / "masks" / "final.safetensors").keep


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
    _check_streamed(model, config)
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
    longest = longest_window(model)
    assert config.num_sequences is not None
    calibration = calibration_sequences(
        config.calibration,
        tokenizer,
        num_sequences=config.num_sequences,
        length=config.sequence_length or longest,
        seed=config.seed,
        model=model,
    )
    evaluation = evaluation_text(config, tokenizer, longest)
    scorer = MaskScorer(
        model,
        layout=layout,
        route=config.route or "auto",
        precision=config.precision or "full",
        memory_budget=config.memory_budget,
    )
    if config.route is not None and scorer.engine.name != "fused":
        raise ValueError(
            f"route: routes exist only in the fused engine, which does not support "
            f"{type(model).__name__}; omit --route"
        )
    scorer.rows_per_batch(calibration.input_ids.shape[1])  # refuses a budget that is too small
    return Task(model, scorer, calibration, config, target), evaluation


def longest_window(model: PreTrainedModel) -> int:
    """Tokens of a window of text, unless asked for otherwise."""
    return min(int(getattr(model.config, "max_position_embeddings", MAX_LENGTH)), MAX_LENGTH)


def evaluation_text(
    config: PruneConfig, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Sequences:
    """Text for perplexity, none of which calibrates.

    Args:
        config: resolved.
        tokenizer: of the model.
        longest: window that it takes.
    Raises:
        ValueError: the text is not there, or too short.
    """
    return evaluation_sequences(
        config.evaluation or ("builtin" if config.calibration == "self" else config.calibration),
        tokenizer,
        max_tokens=config.evaluation_tokens,
        length=min(EVALUATION_LENGTH, longest, config.evaluation_tokens),
        calibration=config.calibration,
    )


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
    warnings_before = len(reporter.warnings)
    if search.task.config.precision is not None and run.start == "new":
        _check_precision(search)
    with PeakMemory(search.task.model.device) as peak:
        keep = METHODS[search.task.config.method].find(search)
    rounds = list(run.saved_masks)
    run.save_mask("final", keep)
    _comment(search, keep)
    result = _result(
        search,
        deliver(search, tokenizer, keep, evaluation),
        rounds=_trajectory(search, rounds, keep, evaluation),
        peak_bytes=peak.bytes,
        warnings=reporter.warnings[warnings_before:],
        seconds=time.perf_counter() - started,
    )
    run.record("finished", result=asdict(result))
    reporter.note(f"the report is {write_report(run.path)}")
    return result


def _result(search: Search, delivery: Delivery, **measured: Any) -> PruneResult:
    layout = search.task.layout
    removed = layout.num_model_parameters - delivery.parameters
    return PruneResult(
        output=str(search.run.model_directory),
        run=str(search.run.path),
        sparsity=removed / layout.num_decoder_parameters,
        sparsity_total=removed / layout.num_model_parameters,
        parameters=delivery.parameters,
        parameters_dense=layout.num_model_parameters,
        dense_perplexity=delivery.dense.value,
        pruned_perplexity=delivery.pruned.value,
        protocol=delivery.dense.protocol,
        latency=delivery.latency,
        tasks=delivery.tasks,
        submodels_scored=search.submodels_scored,
        tokens_scored=search.tokens_scored,
        max_logit_difference=delivery.max_logit_difference,
        **measured,
    )


def check_finite(model: PreTrainedModel) -> None:
    """Raise ValueError if a weight is NaN or Inf."""
    for name, parameter in named_weights(model):
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"the model's weights hold NaN or Inf, first in {name}")


def _check_precision(search: Search) -> None:
    """Say whether the precision that was asked for ranks sub-models as full precision does."""
    task = search.task
    generator = torch.Generator().manual_seed(task.config.seed)
    share = task.target.removal_budget(task.layout) / task.layout.num_decoder_parameters
    draw = torch.rand(CHECKED_SUBMODELS, len(task.layout), generator=generator)
    tokens = task.calibration.input_ids[:CHECKED_SEQUENCES]
    with search.reporter.busy("comparing precisions"):
        found = check_precision(task.scorer, draw >= share, tokens)
    if found.is_sound:
        search.reporter.note(str(found))
    else:
        search.reporter.warn(f"{found}: expect worse choices than in full precision")


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


def _trajectory(
    search: Search, names: list[str], final: torch.Tensor, evaluation: Sequences
) -> list[dict[str, Any]]:
    """Perplexities of what the rounds left, as sub-models of the parent."""
    layout, found = search.task.layout, []
    for name in names:
        mask = load_mask(search.run.path / "masks" / f"{name}.safetensors")
        if torch.equal(mask.keep, final):
            continue
        search.reporter.note(f"measuring perplexity of {name}")
        loss = search.task.scorer.score(mask.keep[None], evaluation.input_ids).double().mean()
        found.append(
            {
                "name": name,
                "sparsity": mask.removed / layout.num_decoder_parameters,
                "perplexity": float(loss.exp()),
            }
        )
    return found


def _check_streamed(model: PreTrainedModel, config: PruneConfig) -> None:
    """Refuse what needs the whole model in memory."""
    stream = stream_of(model)
    if stream is None:
        return
    if stream.origin is None:
        raise ValueError("expected a loaded model, or a streamed one from open_streamed(directory)")
    wanted = {
        f"method {config.method}": config.method in NEED_THE_MODEL,
        "calibration 'self'": config.calibration == "self",
        "tasks": config.tasks is not None,
    }
    for what in (what for what, is_wanted in wanted.items() if is_wanted):
        raise ValueError(f"{what}: needs the whole model in memory, but its layers are streamed")
