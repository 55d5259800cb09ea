"""Write a model to a directory that loads again, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
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
    """Save a model with all that it takes to load it in a fresh process.

    A bonsai_* model takes its Python files along and loads with `trust_remote_code=True`, or
    without it where bonsai_fast has been imported. A model of a stock class is saved as such.
    The files are written beside `directory` and moved there in one step, so that it is complete
    or absent whenever the process stops.

    Args:
        model: what `remove_units` returned, or any other model that is not quantized, in memory or
            streamed.
        directory: where to; missing directories above it are made.
        tokenizer: saved along.
        report: what to say in `bonsai_report.json`, e.g. parent id, rounding, `kept_positions`.
        removed_attention: "absent" leaves nothing of an attention that was removed; "stub" puts one
            head of zeros in its place, for engines that want an attention in every layer (vLLM
            without our plugin).
        overwrite: replace a model that this function saved there before; nothing else, ever.
    Raises:
        ValueError: the model is quantized, or `removed_attention` is neither of these, or "stub"
            for a streamed model.
        FileExistsError: `directory` is a file or holds something else, or a saved model and
            `overwrite` is not set.
        OSError: it cannot be written, for example because the disk is full; nothing is left behind.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantized: save it with its own save_pretrained")
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
        with written_beside(target) as scratch:
            yield scratch
            _drop_quantization(scratch / "config.json")
            text = json.dumps({"written_by": "bonsai_fast", **(report or {})}, indent=2)
            (scratch / REPORT_NAME).write_text(text + "\n")
            write_model_card(scratch, parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not save the model to {target}: {reason}") from error


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to write where something is that may not be replaced.

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
def written_beside(target: Path) -> Iterator[Path]:
    """A scratch directory on the same file system that becomes `target` at the end, or vanishes."""
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
    """A rename may reach the disk before the files do: write them through first."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _drop_quantization(path: Path) -> None:
    """A dequantized model still says how it was quantized, and would not load."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is not None:
        text = json.dumps(config, indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
