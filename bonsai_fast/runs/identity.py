"""What a run is identified by, and what a second start in its directory may therefore do.

The identity is everything that the losses of sub-models, or the pruned weights, depend on. The
request is the rest: the target and what is measured. With the same identity, the same request
resumes, and another request reuses what a finished run recorded; another identity is refused.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import transformers
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import named_weights
from bonsai_fast.config import ResolvedConfig
from bonsai_fast.config.recover_options import RecoverOptions

FORMAT = 1
MANIFEST, RECOVER_MANIFEST = "run.json", "recover.json"
# options that a finished run can change without scoring anything
LAST_STEP = ("head_layout", "round_to", "uniform")
MEASURED = ("evaluation", "evaluation_tokens", "tasks")
# what follows pruning, and so depends on the last step
RECOVERED = tuple(item.name for item in fields(RecoverOptions))
NOT_IDENTITY = ("sparsity", "target", *LAST_STEP, *MEASURED, *RECOVERED)
# options that earlier versions recorded as null
FORMER_NULLS = {
    "route": "auto",
    "precision": "full",
    "spare_first": 0,
    "spare_last": 0,
    "submodels_per_round": 200,
}
# defaults of earlier versions, and what they are now
FORMER_DEFAULTS = {"prior": ("wanda", "auto")}
# a fingerprint reads about this many values of each parameter
FINGERPRINT_VALUES = 4096

Start = Literal["new", "resume", "retarget", "finished"]


def run_identity(
    config: ResolvedConfig[Any],
    without: Sequence[str],
    model: PreTrainedModel,
    calibration_sha256: str | None,
) -> dict[str, Any]:
    """The identity of a run, as run.json records it.

    Args:
        config: its options.
        without: options that are part of the request.
        model: the parent.
        calibration_sha256: hash of the calibration tokens; None if the method reads no text.
    """
    return {
        "config": {
            name: value for name, value in config.values_read().items() if name not in without
        },
        "parent": identity_of(model),
        "calibration_sha256": calibration_sha256,
    }


def identity_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a model is recognised by, and how it is computed."""
    return {
        "name": model.config.name_or_path,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model's parameter names, shapes, dtypes and evenly spaced values."""
    digest = hashlib.sha256()
    for name, parameter in named_weights(model):
        flat = parameter.detach().flatten()
        step = max(1, len(flat) // FINGERPRINT_VALUES)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def versions() -> dict[str, str]:
    """Versions that results may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def start_in(
    path: Path, identity: dict[str, Any], request: dict[str, Any], manifest: str = MANIFEST
) -> Start:
    """What a start in a directory does; see `Run.start`.

    Args:
        path: the directory.
        identity, request: of this start.
        manifest: the file that records those of an earlier one.
    Raises:
        ValueError: the directory holds something else, another run, or an unfinished run with
            another target.
    """
    record = path / manifest
    if record.is_file():
        return _second_start(path, json.loads(record.read_text()), identity, request)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"output {path}: expected a new or empty directory, or a run of bonsai_fast; "
            "found something else there"
        )
    return "new"


def _second_start(
    path: Path, found: dict[str, Any], identity: dict[str, Any], request: dict[str, Any]
) -> Start:
    if found.get("format") != FORMAT:
        raise ValueError(
            f"output {path}: its record has format {found.get('format')}, expected {FORMAT}"
        )
    differences = [
        f"{name}: {before!r} there, {now!r} here"
        for name, before, now in _compared(found, identity)
        if before != now
    ]
    if differences:
        raise ValueError(
            f"output {path} holds another run ({'; '.join(differences)}); choose another directory"
        )
    before = {"recover": "none", **found["request"]}  # earlier versions did not recover
    if found["status"] == "finished":
        is_complete = before == request and (path / "model" / "config.json").is_file()
        return "finished" if is_complete else "retarget"
    if any(before.get(name) != request.get(name) for name in ("target", *LAST_STEP)):
        raise ValueError(
            f"output {path} holds an unfinished run with target {before['target']}; "
            "finish it with its own command first"
        )
    return "resume"


def _compared(found: dict[str, Any], identity: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What is compared: name, value in run.json, value of this start."""
    rows = [("calibration tokens", found.get("calibration_sha256"), identity["calibration_sha256"])]
    before, now = found.get("config", {}), identity["config"]
    for name in sorted(now):  # earlier versions recorded options that the method does not read
        value = before.get(name)
        value = FORMER_NULLS.get(name) if value is None else value
        is_renamed = FORMER_DEFAULTS.get(name) == (value, now[name])
        rows.append((name, now[name] if is_renamed else value, now[name]))
    for model in ("parent", "student"):
        before, now = found.get(model, {}), identity.get(model, {})
        names = sorted(before.keys() | now.keys())
        rows += [(f"{model} {name}", before.get(name), now.get(name)) for name in names]
    return rows
