"""Which formats a pruned model can be written in, known from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from bonsai_fast.checkpoints.saved_model import SavedModel
from bonsai_fast.export.decilm import block_configs
from bonsai_fast.export.gguf.architecture import plan_gguf

CHECKS: dict[str, Callable[[SavedModel], object]] = {"gguf": plan_gguf, "decilm": block_configs}


def expected_formats(model: PreTrainedModel) -> dict[str, str]:
    """For each format "" or why the model cannot be written in it.

    Args:
        model: a pruned model; its weights are not read and may be on the meta device.
    """
    saved = SavedModel(Path(), model.config, dict.fromkeys(model.state_dict(), Path()))
    found = {}
    for name, check in CHECKS.items():
        try:
            check(saved)
        except ValueError as error:
            found[name] = str(error)
        else:
            found[name] = ""
    return found
