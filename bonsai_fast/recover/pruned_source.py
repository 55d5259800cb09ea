"""A saved pruned model as it is named: what it was made from, and on which text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bonsai_fast.checkpoints.saved_model import REPORT_NAME, model_directory
from bonsai_fast.config.choices import ModelDtype
from bonsai_fast.runs.identity import MANIFEST, RECOVER_MANIFEST

# options of a run that its recovery takes over
TAKEN = (
    "calibration",
    "evaluation",
    "evaluation_tokens",
    "memory_budget",
    "num_sequences",
    "seed",
    "sequence_length",
)


@dataclass(frozen=True)
class PrunedSource:
    """A pruned model that will be recovered.

    Attributes:
        name: of the model: its directory, or its name on the hub.
        parent: name of what it was pruned from; None if it does not say.
        fingerprint, dtype: of that, if known.
        options: of the run that made it, as far as recovery has them.
        report: content of its bonsai_report.json.
    """

    name: str
    parent: str | None
    fingerprint: str | None
    dtype: ModelDtype | None
    options: dict[str, Any]
    report: dict[str, Any]


def find_pruned(name: str) -> PrunedSource:
    """Look up what is known about a pruned model.

    Args:
        name: directory of a run or of a model, or a name on the hub.
    Raises:
        ValueError: a directory that holds no model, or a run that is not finished.
    """
    if not Path(name).exists():
        return PrunedSource(name, None, None, None, {}, {})
    directory = model_directory(name)
    report = _json(directory / REPORT_NAME)
    run: dict[str, Any] = {}
    for path in (Path(name), Path(name).resolve().parent):
        run = run or _json(path / RECOVER_MANIFEST) or _json(path / MANIFEST)
    if run and run.get("status") != "finished":
        raise ValueError(f"{name} is an unfinished run: finish it with its own command first")
    told = run.get("parent") or report.get("parent") or {}
    parent = {"name": told} if isinstance(told, str) else told
    asked = {**run.get("config", {}), **run.get("request", {})}
    options = {name: asked[name] for name in TAKEN if asked.get(name) is not None}
    return PrunedSource(
        str(directory),
        parent.get("name") or None,
        parent.get("fingerprint"),
        _dtype(parent.get("dtype")),
        options,
        report,
    )


def _dtype(name: object) -> ModelDtype | None:
    return next((known for known in get_args(ModelDtype) if known == name), None)


def _json(path: Path) -> dict[str, Any]:
    """What a file says; empty if it is not there."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
