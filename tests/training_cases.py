"""Tiny pruned models and text for tests of recovery tiers that train."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import byte_tokenizer, tiny_llama
from transformers import PreTrainedModel

import bonsai_fast as bf
from bonsai_fast.config.choices import Tier
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences, sample_text
from bonsai_fast.recovery import RecoveryTask, TierRecord
from bonsai_fast.recovery.distill import DistillTier

LENGTH = 17


def parent() -> PreTrainedModel:
    """The tiny LLaMA, surer of what comes next: its text tells who predicts as it does."""
    model = tiny_llama()
    model.get_submodule("model.norm").weight.data.mul_(3)
    return model


def text_of(model: PreTrainedModel, sequences: int, seed: int, length: int = LENGTH) -> Sequences:
    """Text that a model wrote: who predicts as that model does predicts it best."""
    ids = sample_text(model, num_sequences=sequences, length=length, seed=seed)
    return Sequences(ids.clone(), "tiny", f"{sequences} sequences")


@cache
def tiny_text(sequences: int, seed: int) -> Sequences:
    """Text that `parent` wrote."""
    return text_of(parent(), sequences, seed)


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    """The same without every third unit: layers end up with different widths."""
    layout = bf.Layout.of(model)
    keep = torch.ones(len(layout), dtype=torch.bool)
    keep[::3] = False
    return bf.remove_units(model, layout, keep)


def tiny_task(folder: Path, **changes: Any) -> RecoveryTask:
    """A pruned tiny LLaMA and its parent.

    Args:
        folder: of the tier.
        changes: fields of RecoveryTask; options as "options", a dict.
    """
    options = {"recover_tokens": 6 * LENGTH, **changes.pop("options", {})}
    values: dict[str, Any] = {
        "text": tiny_text(24, seed=1),
        "held_out": tiny_text(64, seed=2),
        "seed": 5,
        "folder": folder,
        "reporter": Reporter(quiet=True),
        **changes,
    }
    if "teacher" not in values:
        values["teacher"] = parent()
    if "student" not in values:
        values["student"] = pruned(parent())
    return RecoveryTask(tokenizer=byte_tokenizer(), options=RecoverOptions(**options), **values)


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def train(task: RecoveryTask, tier: Tier = "distill", **changes: Any) -> TierRecord:
    """Check the task, then run the tier."""
    chosen = DistillTier(tier, **changes)
    chosen.check(task)
    return chosen.run(task)


def train_and_save(folder: Path, options: dict[str, Any], environment: dict[str, str]) -> None:
    """In a process of its own: train with a checkpoint after every step, and write the weights."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    task = tiny_task(folder, options=options)
    DistillTier("distill", checkpoint_seconds=0.0).run(task)
    rank = environment.get("RANK", "0")
    save_file(weights_of(task.student), folder / f"weights-{rank}.safetensors")
