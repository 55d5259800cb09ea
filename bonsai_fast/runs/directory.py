"""The directory of one run: what was asked, what was found, and how a second start goes on.

    run.json                  identity (config, parent, text, versions), target, status
    model/                    the saved result
    report.html               all of it, to be read

and, where units are removed,

    layout.json               the parent's units
    ledger/                   every evaluation
    rates.json                speeds of the GPU, if any, by which routes were chosen
    priors/STAGE.safetensors  what one forward pass said about each unit
    regressions/STAGE.safetensors   what was estimated from the evaluations of a round
    masks/round-XX.safetensors   the units kept after each round
    relevance.safetensors     what the result was selected by
    samples.json              what both models write

or, where weights are zeroed, until the result is saved,

    layers/NNNN.safetensors   the pruned weights of a decoder layer

A run is identified by everything that its sub-models' losses, or its weights, depend on. The same
identity resumes; the same identity with another target, once finished, is re-targeted from the
ledger alone, or measured again; another identity is refused.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import named_weights
from bonsai_fast.config import ResolvedConfig
from bonsai_fast.files import write_atomically, write_json
from bonsai_fast.models.layout import Layout, describe_layout
from bonsai_fast.runs.ledger import Ledger, LedgerError
from bonsai_fast.runs.mask_files import save_mask

FORMAT = 1
# what a finished run may be asked again, differently, without scoring anything
LAST_STEP = ("head_layout", "round_to", "uniform")
MEASURED = ("evaluation", "evaluation_tokens", "tasks")
NOT_IDENTITY = ("sparsity", "target", *LAST_STEP, *MEASURED)
# what earlier versions recorded as null
FORMER_NULLS = {
    "route": "auto",
    "precision": "full",
    "spare_first": 0,
    "spare_last": 0,
    "submodels_per_round": 200,
}
# a parameter is told from another by this many of its values
FINGERPRINT_VALUES = 4096

Start = Literal["new", "resume", "retarget", "finished"]


@dataclass(frozen=True)
class Run:
    """An open run directory.

    Attributes:
        path: the directory.
        identity: what the run's losses or weights depend on.
        request: what was asked of them: target, last step, measurements.
        start: "new", "resume" (the same command was interrupted), "finished" (it was not) or
            "retarget" (finished before, now toward another target, with another last step or other
            measurements).
    """

    path: Path
    identity: dict[str, Any]
    request: dict[str, Any]
    start: Start

    @property
    def model_directory(self) -> Path:
        return self.path / "model"

    def record(self, status: Literal["running", "finished"], **content: Any) -> None:
        """Write run.json."""
        state = {
            "format": FORMAT,
            "status": status,
            "request": self.request,
            "versions": versions(),
        }
        write_json(self.path / "run.json", {**state, **self.identity, **content})


@dataclass(frozen=True)
class RunDirectory(Run):
    """An open run that removes units.

    Attributes:
        ledger: its evaluations.
        layout: the parent's units.
        saved_masks: names of the masks that this start has saved, in that order.
    """

    ledger: Ledger
    layout: Layout
    saved_masks: list[str] = field(default_factory=list)

    def prior_path(self, stage: str) -> Path:
        """Where the prior of a stage, such as "round-01", is kept."""
        folder = self.path / "priors"
        folder.mkdir(exist_ok=True)
        return folder / f"{stage}.safetensors"

    def save_mask(self, name: str, keep: torch.Tensor) -> None:
        """Record the units kept after a round, bool [P], as masks/NAME.safetensors."""
        folder = self.path / "masks"
        folder.mkdir(exist_ok=True)
        save_mask(folder / f"{name}.safetensors", self.layout, keep)
        self.saved_masks.append(name)


@dataclass(frozen=True)
class WeightRun(Run):
    """An open run that zeroes weights."""

    def has_layer(self, number: int) -> bool:
        """Whether a decoder layer is on record; it is not read."""
        return self._layer_path(number).is_file()

    def layer(self, number: int) -> dict[str, torch.Tensor] | None:
        """Pruned weights of a decoder layer by parameter name, or None if it is not done.

        Raises:
            LedgerError: the record is damaged.
        """
        if not self.has_layer(number):
            return None
        path = self._layer_path(number)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise LedgerError(
                f"{path} cannot be read: {error}; delete it to prune that layer again"
            ) from error

    def save_layer(self, number: int, weights: dict[str, torch.Tensor]) -> None:
        """Record the pruned weights of a decoder layer."""
        path = self._layer_path(number)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, save({name: x.contiguous() for name, x in weights.items()}))

    def drop_layers(self) -> None:
        """Forget the layers: the saved model holds them."""
        shutil.rmtree(self._layer_path(0).parent, ignore_errors=True)

    def _layer_path(self, number: int) -> Path:
        return self.path / "layers" / f"{number:04d}.safetensors"


def open_run(
    path: Path,
    config: ResolvedConfig[Any],
    layout: Layout,
    model: PreTrainedModel,
    calibration_sha256: str,
) -> RunDirectory:
    """Start, resume or re-target a run that removes units.

    Raises:
        ValueError: the directory holds something else, another run, or an unfinished run toward
            another target.
    """
    identity = run_identity(config, NOT_IDENTITY, model, calibration_sha256)
    identity["parent"]["num_units"] = len(layout)
    options = config.values()
    request = {
        "target": config.target_text,
        **{name: options[name] for name in (*LAST_STEP, *MEASURED)},
    }
    start = _open(path, identity, request)
    ledger = Ledger(path / "ledger", len(layout))
    run = RunDirectory(path, identity, request, start, ledger, layout)
    if start in ("new", "resume"):
        write_json(path / "layout.json", describe_layout(layout))
        run.record("running")
    return run


def open_weight_run(
    path: Path,
    config: ResolvedConfig[Any],
    model: PreTrainedModel,
    calibration_sha256: str | None,
) -> WeightRun:
    """Start, resume or measure again a run that zeroes weights.

    Args:
        calibration_sha256: None if the method reads no text.
    Raises:
        ValueError: as `open_run`; another sparsity or pattern is another run.
    """
    identity = run_identity(config, MEASURED, model, calibration_sha256)
    options = config.values()
    request = {name: options[name] for name in MEASURED}
    run = WeightRun(path, identity, request, _open(path, identity, request))
    if run.start in ("new", "resume"):
        run.record("running")
    return run


def _open(path: Path, identity: dict[str, Any], request: dict[str, Any]) -> Start:
    """Compare with what is there, and make the directory."""
    manifest = path / "run.json"
    start: Start = "new"
    if manifest.is_file():
        start = _compare(path, json.loads(manifest.read_text()), identity, request)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"output {path}: expected a new or empty directory or a run of ours, "
            f"found something else there"
        )
    path.mkdir(parents=True, exist_ok=True)
    for unfinished in path.glob(".model.*"):  # a save that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    return start


def run_identity(
    config: ResolvedConfig[Any],
    without: Sequence[str],
    model: PreTrainedModel,
    calibration_sha256: str | None,
) -> dict[str, Any]:
    """What the losses or weights of a run depend on: all of its configuration but some options."""
    return {
        "config": {
            name: value for name, value in config.values_read().items() if name not in without
        },
        "parent": {
            "name": model.config.name_or_path,
            "fingerprint": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        },
        "calibration_sha256": calibration_sha256,
    }


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model's parameter names, shapes, dtypes and a spread of their values."""
    digest = hashlib.sha256()
    for name, parameter in named_weights(model):
        flat = parameter.detach().flatten()
        step = max(1, len(flat) // FINGERPRINT_VALUES)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _compare(
    path: Path, found: dict[str, Any], identity: dict[str, Any], request: dict[str, Any]
) -> Start:
    if found.get("format") != FORMAT:
        raise ValueError(
            f"output {path}: its run.json has format {found.get('format')}, expected {FORMAT}"
        )
    differences = [
        f"{name}: {before!r} there, {now!r} here"
        for name, before, now in _differences(found, identity)
        if before != now
    ]
    if differences:
        raise ValueError(
            f"output {path} holds another run ({'; '.join(differences)}); choose another directory"
        )
    before = found["request"]
    if found["status"] == "finished":
        return (
            "finished"
            if before == request and (path / "model" / "config.json").is_file()
            else "retarget"
        )
    if any(before.get(name) != request.get(name) for name in ("target", *LAST_STEP)):
        raise ValueError(
            f"output {path} holds an unfinished run toward {before['target']}; "
            f"finish it with the same command first"
        )
    return "resume"


def _differences(found: dict[str, Any], identity: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    rows = [("calibration tokens", found.get("calibration_sha256"), identity["calibration_sha256"])]
    before, now = found.get("config", {}), identity["config"]
    for name in sorted(now):  # earlier versions recorded options that the method does not read
        value = before.get(name)
        rows.append((name, FORMER_NULLS.get(name) if value is None else value, now[name]))
    before, now = found.get("parent", {}), identity["parent"]
    rows += [(name, before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())]
    return rows
