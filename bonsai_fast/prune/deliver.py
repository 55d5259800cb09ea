"""What comes of a keep mask: the smaller model on disk, held to its parent and measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.streaming import LayerStream, open_streamed, stream_of
from bonsai_fast.evaluation.completions import complete, save_completions
from bonsai_fast.evaluation.perplexity import Perplexity, perplexity
from bonsai_fast.evaluation.tasks import evaluate_tasks
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.latency.timing import Workload, measure_latency
from bonsai_fast.methods import METHODS, Compensates, Search
from bonsai_fast.scoring import masked
from bonsai_fast.surgery import (
    SavedModelError,
    kept_positions,
    remove_units,
    save_pretrained,
    slice_checkpoint,
    verify_saved,
)

VERIFIED_TOKENS = 64


@dataclass(frozen=True)
class Delivery:
    """A smaller model that was saved.

    Attributes:
        parameters: of it.
        dense, pruned: perplexity of the parent and of it.
        latency: speeds of "dense" and "pruned"; empty for a streamed model, whose speed is the
            disk's.
        tasks: zero-shot results of both, if any were asked for.
        max_logit_difference: from what it should compute.
    """

    parameters: int
    dense: Perplexity
    pruned: Perplexity
    latency: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, dict[str, float]]]
    max_logit_difference: float


def deliver(
    search: Search, tokenizer: PreTrainedTokenizerBase, keep: torch.Tensor, evaluation: Sequences
) -> Delivery:
    """Cut, save, load again, compare, measure.

    Raises:
        OSError: the model cannot be saved.
        SavedModelError: what was saved computes something else.
    """
    stream = stream_of(search.task.model)
    if stream is not None:
        return _deliver_streamed(search, stream, keep, evaluation)
    task, reporter = search.task, search.reporter
    model, smaller = task.model, pruned_model(search, keep)
    directory = search.run.model_directory
    save_pretrained(
        smaller, directory, tokenizer=tokenizer, report=_report(search, keep), overwrite=True
    )
    reporter.note(f"saved to {directory}; loading it again in a fresh process")
    tokens = evaluation.input_ids[:1, :VERIFIED_TOKENS]
    logits = _logits(smaller, tokens)
    difference = verify_saved(
        directory, tokens, logits, tolerance=logit_tolerance(logits, smaller.dtype)
    )
    reporter.note(f"it gives the same logits there (largest difference {difference:.2g})")
    dense, pruned = _perplexities(search, smaller, evaluation)
    reporter.note("measuring latency, dense and pruned in turns")
    models = {"dense": model, "pruned": smaller}
    latency = measure_latency(models, Workload.fitting(models))
    save_completions(search.run.path, complete(model, smaller, tokenizer))
    tasks = {}
    if task.config.tasks is not None:
        names = task.config.task_names
        tasks = {
            "dense": evaluate_tasks(model, tokenizer, names),
            "pruned": evaluate_tasks(smaller, tokenizer, names),
        }
    return Delivery(
        parameters=smaller.num_parameters(),
        dense=dense,
        pruned=pruned,
        latency={name: asdict(value) for name, value in latency.items()},
        tasks=tasks,
        max_logit_difference=difference,
    )


def pruned_model(search: Search, keep: torch.Tensor) -> PreTrainedModel:
    """The smaller model of a keep mask, with whatever its method compensates."""
    smaller = remove_units(search.task.model, search.task.layout, keep)
    method = METHODS[search.task.config.method]
    if isinstance(method, Compensates):
        method.compensate(search, smaller, keep)
    return smaller


def _deliver_streamed(
    search: Search, stream: LayerStream, keep: torch.Tensor, evaluation: Sequences
) -> Delivery:
    """The same from directory to directory: neither model is ever in memory as a whole."""
    task, reporter = search.task, search.reporter
    model, layout, origin = task.model, task.layout, stream.origin
    assert origin is not None  # `prepare` has refused it
    directory = search.run.model_directory
    cut = slice_checkpoint(
        origin.directory,
        keep,
        directory,
        attention=layout.attention,
        sublayers=layout.sublayers,
        dtype=model.dtype,
        trust_remote_code=origin.trust_remote_code,
        overwrite=True,
        report=_report(search, keep),
        reporter=reporter,
    )
    reporter.note(f"saved to {directory}; opening it and comparing it with the masked parent")
    smaller = open_streamed(
        directory,
        device=model.device,
        dtype=model.dtype,
        trust_remote_code=origin.trust_remote_code,
    )
    tokens = evaluation.input_ids[:1, :VERIFIED_TOKENS]
    with masked(model, layout, keep[None].to(model.device)):
        expected = _logits(model, tokens)
    difference = float((_logits(smaller, tokens) - expected).abs().max())
    tolerance = logit_tolerance(expected, model.dtype)
    if not difference <= tolerance:  # NaN is not
        raise SavedModelError(
            f"{directory} opens, but its logits differ by {difference:.3g}, "
            f"more than {tolerance:.3g}"
        )
    reporter.note(f"it gives the same logits (largest difference {difference:.2g})")
    dense, pruned = _perplexities(search, smaller, evaluation)
    return Delivery(
        parameters=cut.parameters,
        dense=dense,
        pruned=pruned,
        latency={},
        tasks={},
        max_logit_difference=difference,
    )


def _perplexities(
    search: Search, smaller: PreTrainedModel, evaluation: Sequences
) -> tuple[Perplexity, Perplexity]:
    search.reporter.note(f"measuring perplexity on {evaluation.source}: {evaluation.description}")
    return perplexity(search.task.model, evaluation), perplexity(smaller, evaluation)


def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def logit_tolerance(logits: torch.Tensor, dtype: torch.dtype) -> float:
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
