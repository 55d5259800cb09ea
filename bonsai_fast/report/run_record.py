"""A run directory, read without its model and without locking it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bonsai_fast.evaluation.completions import Completion, load_completions
from bonsai_fast.methods.regression import RecordedRegression, load_regression
from bonsai_fast.runs.ledger import Entry, read_entries
from bonsai_fast.runs.mask_files import SavedMask, load_mask

WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class GroupRecord:
    """The units of one kind in one layer: positions start..stop-1.

    Attributes:
        layer, kind: where and what.
        start, stop: positions.
        num_parameters: of each unit.
        kv_of_head: KV head that each query head of the layer reads; empty unless about attention.
    """

    layer: int
    kind: str
    start: int
    stop: int
    num_parameters: int
    kv_of_head: tuple[int, ...]

    @property
    def is_attention(self) -> bool:
        return self.kind in ("head", "kv_group", "attention")


@dataclass(frozen=True)
class LayoutRecord:
    """The parent's units as layout.json records them; see `describe_layout`."""

    num_layers: int
    num_decoder_parameters: int
    num_model_parameters: int
    groups: tuple[GroupRecord, ...]

    @classmethod
    def read(cls, path: Path) -> LayoutRecord:
        """Read layout.json."""
        content = read_json(path)
        groups, start = [], 0
        for found in content["groups"]:
            stop = start + int(found["num_units"])
            kv_of_head = tuple(found.get("kv_of_head", ()))
            groups.append(
                GroupRecord(
                    found["layer"], found["kind"], start, stop, found["num_parameters"], kv_of_head
                )
            )
            start = stop
        return cls(
            content["num_layers"],
            content["num_decoder_parameters"],
            content["num_model_parameters"],
            tuple(groups),
        )

    @property
    def num_units(self) -> int:
        return self.groups[-1].stop if self.groups else 0


@dataclass(frozen=True, eq=False)
class Stage:
    """All ledger entries of one stage.

    Attributes:
        measure: what the values are: "" for losses in nats per predicted token, "compensated" for
            those of sub-models with their own output projections.
        keep: bool [S, P].
        values: float32 [S, B].
    """

    measure: str
    keep: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class RunRecord:
    """Everything that a run recorded.

    Attributes:
        path: its directory.
        manifest: run.json.
        layout: the parent's units; None if the run does not say.
        masks: units kept after each round ("round-01", ...) and in the result ("final").
        stages: the ledger, in the order in which it was written.
        regressions: what rounds were decided by.
        relevance: float64 [P], what the result was selected by, if it was kept.
        completions: what both models write.
    """

    path: Path
    manifest: dict[str, Any]
    layout: LayoutRecord | None
    masks: dict[str, SavedMask]
    stages: dict[str, Stage]
    regressions: dict[str, RecordedRegression]
    relevance: torch.Tensor | None
    completions: list[Completion]

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a run directory, finished or not.

        Raises:
            ValueError: not a run, or a file in it is damaged.
            OSError: a file cannot be read.
        """
        manifest = read_json(path / "run.json", "a run directory of bonsai_fast")
        if not isinstance(manifest, dict) or not {"config", "parent", "request"} <= set(manifest):
            raise ValueError(f"{path / 'run.json'}: expected the record of a run")
        layout_path, relevance_path = path / "layout.json", path / "relevance.safetensors"
        try:
            layout = LayoutRecord.read(layout_path) if layout_path.is_file() else None
            relevance = load_file(relevance_path) if relevance_path.is_file() else {}
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{path}: a record is damaged: {error}") from error
        masks = sorted((path / "masks").glob("*.safetensors"))
        regressions = sorted((path / "regressions").glob("*.safetensors"))
        return cls(
            path=path,
            manifest=manifest,
            layout=layout,
            masks={file.stem: load_mask(file) for file in masks},
            stages=_stages(path / "ledger", int(manifest["parent"].get("num_units", 0))),
            regressions={file.stem: load_regression(file) for file in regressions},
            relevance=relevance.get("relevance"),
            completions=load_completions(path),
        )

    @property
    def finished(self) -> bool:
        return bool(self.manifest.get("status") == "finished" and "result" in self.manifest)

    @property
    def result(self) -> dict[str, Any]:
        """The result of a finished run; empty while it is not finished."""
        return dict(self.manifest["result"]) if self.finished else {}

    @property
    def kept(self) -> tuple[str, SavedMask] | None:
        """The last recorded mask: the result's, or else the last round's."""
        if "final" in self.masks:
            return "final", self.masks["final"]
        rounds = self.round_names
        return (rounds[-1], self.masks[rounds[-1]]) if rounds else None

    @property
    def round_names(self) -> list[str]:
        """Names of the rounds with a recorded mask, in order."""
        return sorted(name for name in self.masks if name.startswith("round-"))

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the saved model's weight files; None if no model was saved."""
        model = self.path / "model"
        sizes = [file.stat().st_size for form in WEIGHTS for file in model.glob(form)]
        return sum(sizes) if sizes else None


def read_json(path: Path, expected: str = "a record of a run") -> Any:
    """Read JSON.

    Raises:
        ValueError: not there, or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected {expected}: {error}") from error


def _stages(directory: Path, num_units: int) -> dict[str, Stage]:
    found: dict[str, list[Entry]] = {}
    for entry in read_entries(directory, num_units):
        found.setdefault(entry.stage, []).append(entry)
    stages = {}
    for name, entries in found.items():
        # a stage may be scored on several texts; only entries of equal shape are stacked
        entries = [e for e in entries if e.losses.shape[1] == entries[0].losses.shape[1]]
        measure = entries[0].text.rpartition(" ")[0]
        stages[name] = Stage(
            measure,
            torch.cat([entry.keep for entry in entries]),
            torch.cat([entry.losses for entry in entries]),
        )
    return stages
