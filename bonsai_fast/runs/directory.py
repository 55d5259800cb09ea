"""The directory of one run.

    run.json                        identity, request, status, result; see `identity`
    model/                          the saved model
    report.html                     the report
    recovery/                       until the model is saved: what recovery tiers have finished

and, if units are removed,

    layout.json                     the parent's units
    ledger/                         every evaluation
    rates.json                      speeds of the GPU that routes were chosen by, if there is one
    priors/STAGE.safetensors        importance of each unit from one forward pass
    regressions/STAGE.safetensors   estimates from the evaluations of a round
    masks/round-XX.safetensors      units kept after each round
    relevance.safetensors           relevance that the final units were selected by
    samples.json                    completions of both models

or, if weights are zeroed, until the model is saved,

    layers/NNNN.safetensors         pruned weights of a decoder layer
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from bonsai_fast.config import ResolvedConfig
from bonsai_fast.config.recover_config import RecoverConfig
from bonsai_fast.files import write_json
from bonsai_fast.models.layout import Layout, describe_layout
from bonsai_fast.runs.identity import (
    FORMAT,
    LAST_STEP,
    MANIFEST,
    MEASURED,
    NOT_IDENTITY,
    RECOVER_MANIFEST,
    RECOVERED,
    Start,
    identity_of,
    run_identity,
    start_in,
    versions,
)
from bonsai_fast.runs.layer_record import LayerRecord
from bonsai_fast.runs.ledger import Ledger
from bonsai_fast.runs.mask_files import save_mask


@dataclass(frozen=True)
class Run:
    """An open run directory.

    Attributes:
        path: the directory.
        identity: what the losses or weights of the run depend on.
        request: target, last step, recovery and measurements.
        start: "new"; "resume": the same request was interrupted; "finished": it was completed;
            "retarget": another request was completed.
    """

    MANIFEST: ClassVar[str] = MANIFEST

    path: Path
    identity: dict[str, Any]
    request: dict[str, Any]
    start: Start

    @property
    def model_directory(self) -> Path:
        return self.path / "model"

    def begin(self) -> None:
        """Make the directory, delete what a killed save left, and record that work begins."""
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob(".model.*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        if self.start in ("new", "resume"):
            self.record("running")

    def record(self, status: Literal["running", "finished"], **content: Any) -> None:
        """Write the record of the run: run.json."""
        state = {
            "format": FORMAT,
            "status": status,
            "request": self.request,
            "versions": versions(),
        }
        write_json(self.path / self.MANIFEST, {**state, **self.identity, **content})


@dataclass(frozen=True)
class RecoverRun(Run):
    """A directory in which a saved model is recovered."""

    MANIFEST: ClassVar[str] = RECOVER_MANIFEST


@dataclass(frozen=True)
class UnitRun(Run):
    """An open run that removes units.

    Attributes:
        ledger: its evaluations.
        layout: the parent's units.
        saved_masks: names of the masks that this start has saved, in that order.
    """

    ledger: Ledger
    layout: Layout
    saved_masks: list[str] = field(default_factory=list)

    def begin(self) -> None:
        if self.start in ("new", "resume"):
            write_json(self.path / "layout.json", describe_layout(self.layout))
        super().begin()

    def prior_path(self, stage: str) -> Path:
        """File of the prior of a stage, such as "round-01"."""
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

    @property
    def layers(self) -> LayerRecord:
        """Pruned weights of decoder layers, until the model is saved."""
        return LayerRecord(self.path / "layers")


def open_run(
    path: Path,
    config: ResolvedConfig[Any],
    layout: Layout,
    model: PreTrainedModel,
    calibration_sha256: str,
) -> UnitRun:
    """Start, resume or retarget a run that removes units.

    Raises:
        ValueError: the directory holds something else, another run, or an unfinished run with
            another target.
        OSError: the directory cannot be created.
    """
    identity = run_identity(config, NOT_IDENTITY, model, calibration_sha256)
    identity["parent"]["num_units"] = len(layout)
    request = {"target": config.target_text, **_request(config, *LAST_STEP)}
    start = start_in(path, identity, request)
    run = UnitRun(path, identity, request, start, Ledger(path / "ledger", len(layout)), layout)
    run.begin()
    return run


def open_weight_run(
    path: Path,
    config: ResolvedConfig[Any],
    model: PreTrainedModel,
    calibration_sha256: str | None,
) -> WeightRun:
    """Start or resume a run that zeroes weights, or measure a finished one again.

    Raises:
        ValueError, OSError: as `open_run`; another sparsity or pattern is another run.
    """
    without = (*MEASURED, *RECOVERED)
    identity = run_identity(config, without, model, calibration_sha256)
    request = _request(config)
    run = WeightRun(path, identity, request, start_in(path, identity, request))
    run.begin()
    return run


def open_recover_run(
    path: Path,
    config: RecoverConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    calibration_sha256: str,
) -> RecoverRun:
    """Start or resume the recovery of a saved model.

    Raises:
        ValueError, OSError: as `open_run`; anything else that is asked for is another run.
    """
    values = config.values_read()
    method = values.pop("recover")
    identity = {
        "config": {**values, "method": method},
        "student": identity_of(student),
        "parent": identity_of(teacher),
        "calibration_sha256": calibration_sha256,
    }
    request = {"recover": method}
    run = RecoverRun(path, identity, request, start_in(path, identity, request, RECOVER_MANIFEST))
    run.begin()
    return run


def _request(config: ResolvedConfig[Any], *names: str) -> dict[str, Any]:
    """Values of these options, of what is measured, and of recovery as far as it reads them."""
    values, read = config.values(), config.values_read()
    recovery = {name: read[name] for name in RECOVERED if name in read}
    return {name: values[name] for name in (*names, *MEASURED)} | recovery
