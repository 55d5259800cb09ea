"""Checks and texts that both kinds of run share, all before any work is done."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.finite import check_finite
from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.config import ResolvedConfig
from bonsai_fast.evaluation.tasks import check_tasks
from bonsai_fast.evaluation.text import (
    EVALUATION_LENGTH,
    Sequences,
    calibration_sequences,
    evaluation_sequences,
    longest_window,
)
from bonsai_fast.methods import EXPERT_METHODS, WEIGHT_METHODS
from bonsai_fast.models.experts import CHANNEL_MULTIPLE
from bonsai_fast.models.layout import Layout
from bonsai_fast.recovery.closed_form.output_grams import check_projections
from bonsai_fast.surgery.save import check_savable

# methods over units that differentiate, perturb or change the model itself
NEED_THE_MODEL = ("flap", "mini-llm", "taylor")


def check_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ResolvedConfig[Any]
) -> None:
    """Refuse a model that the request cannot be met on.

    Raises:
        ValueError: its layers are streamed and the request needs all of them in memory, a weight is
            NaN or Inf, the model or its tokenizer cannot be saved, or a task is unknown.
    """
    _check_streamed(model, config)
    check_savable(model, tokenizer)
    check_finite(model, "the model")
    if config.tasks is not None:
        check_tasks(config.task_names)


def check_units(model: PreTrainedModel, layout: Layout, config: ResolvedConfig[Any]) -> None:
    """Refuse a method that cannot say what the units of a layout are worth.

    Raises:
        ValueError: there are experts, and the method or its prior knows none; or the prior refits
            projections that it cannot refit.
    """
    if getattr(config.options, "prior", None) == "obs":
        check_projections(model)
    if not layout.has_mixtures:
        return
    if getattr(config.options, "prior", None) == "obs":
        raise ValueError("prior obs: it refits one projection, and experts have one each; use reap")
    multiple = config.options.width_multiple
    by_channel = layout.experts == "channel"
    if by_channel and multiple != "auto" and multiple % CHANNEL_MULTIPLE:
        raise ValueError(
            f"round_to: channels inside experts are kept in multiples of {CHANNEL_MULTIPLE}, "
            f"got {multiple}"
        )
    if config.method not in EXPERT_METHODS:
        raise ValueError(
            f"method {config.method}: it cannot say what an expert is worth; for a mixture of "
            f"experts use one of {', '.join(EXPERT_METHODS)}"
        )


def calibration_text(
    config: ResolvedConfig[Any],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    length: int,
) -> Sequences:
    """Text that the method reads, in windows of `length` tokens.

    Raises:
        ValueError: the text is missing or too short.
    """
    return calibration_sequences(
        config.calibration,
        tokenizer,
        num_sequences=config.num_sequences,
        length=length,
        seed=config.seed,
        model=model,
    )


def evaluation_text(
    config: ResolvedConfig[Any], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Sequences:
    """Text for perplexity; none of it is used for calibration.

    Raises:
        ValueError: the text is missing or too short.
    """
    return evaluation_sequences(
        config.evaluation or ("builtin" if config.calibration == "self" else config.calibration),
        tokenizer,
        max_tokens=config.evaluation_tokens,
        length=min(EVALUATION_LENGTH, longest_window(model), config.evaluation_tokens),
        calibration=config.calibration,
    )


def _check_streamed(model: PreTrainedModel, config: ResolvedConfig[Any]) -> None:
    stream = stream_of(model)
    if stream is None:
        return
    needs_model = {
        f"method {config.method}": config.method in NEED_THE_MODEL,
        "calibration 'self'": config.calibration == "self",
        "tasks": config.tasks is not None,
    }
    for what in (what for what, is_wanted in needs_model.items() if is_wanted):
        raise ValueError(f"{what}: needs the whole model in memory, but its layers are streamed")
    if stream.origin is None and config.method not in WEIGHT_METHODS:
        raise ValueError("expected a loaded model, or a streamed one from open_streamed(directory)")
