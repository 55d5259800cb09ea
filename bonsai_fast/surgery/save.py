"""Save a model to a directory, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.saved_model import REPORT_NAME
from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.hub import register
from bonsai_fast.surgery.model_card import write_model_card
from bonsai_fast.surgery.save_streamed import write_streamed
from bonsai_fast.surgery.stub_attention import with_stub_attention

RemovedAttentionForm = Literal["absent", "stub"]


def save_pretrained(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict[str, Any] | None = None,
    removed_attention: RemovedAttentionForm = "absent",
    overwrite: bool = False,
) -> None:
    """Save a model with everything that a fresh process needs to load it.

    A bonsai_* model is saved with its Python files: it loads with `trust_remote_code=True`, or
    without it if bonsai_fast has been imported. A model of a stock class is saved as such. The
    model card (README.md) says what was removed and how to load the model.
    Files are written beside `directory` and moved there in one step: whenever the process stops,
    the directory is complete or does not exist.

    Args:
        model: what `remove_units` returned, or any other model that is not quantized, in memory or
            streamed.
        directory: of the saved model; missing directories above it are made.
        tokenizer: saved with the model.
        report: content of `bonsai_report.json`, such as the parent's name and `kept_positions`.
        removed_attention: "absent": a removed attention has no tensors. "stub": it becomes one head
            of zeros, for engines that need an attention in every layer (vLLM without our plugin).
        overwrite: replace a model that this function saved there before; never anything else.
    Raises:
        ValueError: the model is quantized, or `removed_attention` is neither of these, or "stub"
            for a streamed model.
        FileExistsError: `directory` is a file or holds something else, or a saved model and
            `overwrite` is not set.
        OSError: it cannot be written, for example because the disk is full; no part of it is left.
    """
    check_unquantized(model)
    if removed_attention not in get_args(RemovedAttentionForm):
        raise ValueError(
            f"removed_attention: expected 'absent' or 'stub', got {removed_attention!r}"
        )
    if removed_attention == "stub":
        if stream_of(model) is not None:
            raise ValueError(
                "removed_attention 'stub': expected a model in memory, got a streamed one"
            )
        model = with_stub_attention(model)
    parent = model.config.name_or_path
    with model_directory(directory, parent, report=report, overwrite=overwrite) as scratch:
        if stream_of(model) is None:
            model.save_pretrained(scratch)
        else:
            write_streamed(model, scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)


def check_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what `save_pretrained` could not write; asked before any work.

    Raises:
        ValueError: the model is quantized, or the tokenizer cannot be saved.
    """
    check_unquantized(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except (ValueError, OSError, NotImplementedError) as error:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot be saved with the pruned model: "
                f"{str(error) or 'it has no vocabulary to write'}"
            ) from error


def check_unquantized(model: PreTrainedModel) -> None:
    """Raise ValueError if the weights are quantized."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantized: prune it before quantization, or call model.dequantize() first"
        )


@contextmanager
def model_directory(
    directory: str | os.PathLike[str],
    parent: str | None,
    *,
    report: dict[str, Any] | None,
    overwrite: bool = False,
) -> Iterator[Path]:
    """A scratch directory to save a model in; at the end it becomes `directory`, or is deleted.

    Args:
        directory, report, overwrite: as in `save_pretrained`.
        parent: name of what the model was made from, for the card, if the report does not say.
    Raises:
        FileExistsError, OSError: as `save_pretrained`.
    """
    target = Path(directory)
    check_target(target, overwrite)
    register()  # lets transformers copy the Python files of a bonsai_* model
    try:
        with _written_beside(target) as scratch:
            yield scratch
            _drop_quantization(scratch / "config.json")
            text = json.dumps({"written_by": "bonsai_fast", **(report or {})}, indent=2)
            (scratch / REPORT_NAME).write_text(text + "\n")
            write_model_card(scratch, parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not save the model to {target}: {reason}") from error


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a directory with content that may not be replaced.

    Raises:
        FileExistsError: as in `save_pretrained`.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; a model is saved to a directory")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / REPORT_NAME).is_file():
        raise FileExistsError(
            f"{target} is not empty and no model that bonsai_fast saved; choose another directory"
        )
    if not overwrite:
        raise FileExistsError(f"{target} holds a saved model; pass overwrite=True to replace it")


@contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
    """A scratch directory on the same file system; at the end it becomes `target` or is deleted."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{target.name}.{uuid.uuid4().hex[:8]}"
    scratch, replaced = target.with_name(f"{stem}.new"), target.with_name(f"{stem}.old")
    scratch.mkdir()
    try:
        yield scratch
        _flush(scratch)
        if target.exists():
            target.rename(replaced)
        try:
            scratch.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Flush files to the disk, because a rename may reach it before their content."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _drop_quantization(path: Path) -> None:
    """Drop the quantization entry of a dequantized model, with which it would not load."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is not None:
        text = json.dumps(config, indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
