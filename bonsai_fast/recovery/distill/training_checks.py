"""What a tier that trains refuses before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.recovery.distill.recipe import Recipe
from bonsai_fast.recovery.recovery_task import RecoveryTask

# what a training writes
FILES = ("training-state.safetensors", "best-*.safetensors", "teacher-states*")


def check_models(task: RecoveryTask) -> None:
    """Raise ValueError for models that cannot be trained, or not learned from."""
    if stream_of(task.student) is not None:
        raise ValueError(
            "training needs the whole pruned model in memory, and it is streamed; load it whole, "
            "or use --recover compensate or reconstruct"
        )
    for what, model in (("pruned model", task.student), ("parent", task.teacher)):
        if _is_quantised(model):
            raise ValueError(
                f"the {what} is quantised; expected weights in bfloat16, float16 or float32: load "
                "it before quantisation"
            )
    sizes = [_vocabulary(model) for model in (task.student, task.teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the pruned model has a vocabulary of {sizes[0]} tokens and its parent one of "
            f"{sizes[1]}; expected the same tokenizer"
        )


def check_text(task: RecoveryTask, recipe: Recipe) -> None:
    """Raise ValueError for text that cannot be trained or measured on."""
    for what, text in (("text", task.text), ("held-out text", task.held_out)):
        sequences, length = text.input_ids.shape
        if sequences < 1 or length < 2:
            raise ValueError(
                f"{recipe.name}: expected {what} of at least one sequence of 2 tokens, got "
                f"{sequences} of {length}; {text.source!r} is too short"
            )
        largest, vocabulary = int(text.input_ids.max()), _vocabulary(task.student)
        if largest >= vocabulary:
            raise ValueError(
                f"{what} has token {largest}, the model's vocabulary {vocabulary} tokens; expected "
                "the model's own tokenizer"
            )
    if recipe.tokens < task.text.input_ids.shape[1]:
        raise ValueError(
            f"{recipe.name}: expected at least one sequence of {task.text.input_ids.shape[1]} "
            f"tokens, got {recipe.tokens} tokens"
        )


def check_hidden_term(task: RecoveryTask, recipe: Recipe) -> None:
    """Raise ValueError if hidden states are to be compared and differ in size."""
    if not recipe.terms.hidden:
        return
    sizes = [
        model.get_output_embeddings().weight.shape[1] for model in (task.student, task.teacher)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"recover_hidden: expected the parent's hidden size {sizes[1]}, the pruned model has "
            f"{sizes[0]}; omit it"
        )


def check_disk(folder: Path, needed: int) -> None:
    """Raise ValueError if a folder's disk has less room than the files that are not there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    written = sum(path.stat().st_size for name in FILES for path in folder.glob(name))
    free = shutil.disk_usage(there).free
    if free < needed - written:
        raise ValueError(
            f"{folder}: recovery needs {_gib(needed - written)} GiB on the disk, "
            f"{_gib(free)} GiB are free; choose another directory, fewer tokens "
            "or --recover-teacher live"
        )


def _is_quantised(model: PreTrainedModel) -> bool:
    if getattr(model, "hf_quantizer", None) is not None:
        return True
    if getattr(model.config, "quantization_config", None) is not None:
        return True
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return any(parameter.dtype not in floats for parameter in model.parameters())


def _vocabulary(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__}: expected a causal language model, found no head")
    return int(head.weight.shape[0])


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
