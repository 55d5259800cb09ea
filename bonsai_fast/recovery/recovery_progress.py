"""Which recovery tiers are finished, on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bonsai_fast.files import write_json
from bonsai_fast.recovery.recovery_task import TierRecord, TrainingPoint

FILE = "finished.json"


@dataclass(frozen=True)
class RecoveryProgress:
    """The finished tiers of one recovery.

    Attributes:
        folder: of the recovery.
        identity: what its results depend on.
        records: what each finished tier did, in order.
    """

    folder: Path
    identity: dict[str, Any]
    records: list[TierRecord] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> RecoveryProgress:
        """Read the record of an interrupted start; what another recovery left is deleted.

        Raises:
            OSError: the folder cannot be made.
        """
        path = folder / FILE
        if path.is_file():
            found = json.loads(path.read_text())
            if found["identity"] == identity:
                return cls(folder, identity, [read_record(each) for each in found["records"]])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        progress = cls(folder, identity)
        progress._write()
        return progress

    def add(self, record: TierRecord) -> None:
        """Record a finished tier."""
        self.records.append(record)
        self._write()

    def _write(self) -> None:
        records = [asdict(record) for record in self.records]
        write_json(self.folder / FILE, {"identity": self.identity, "records": records})


def read_record(values: dict[str, Any]) -> TierRecord:
    """A record from what `asdict` made of it."""
    curve = [TrainingPoint(**point) for point in values.get("curve", [])]
    return TierRecord(**{**values, "curve": curve})
