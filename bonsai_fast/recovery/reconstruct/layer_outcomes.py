"""What reconstruction has done so far, on disk, so that an interrupted start can be continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from bonsai_fast.files import write_json
from bonsai_fast.recovery.reconstruct.layer_training import LayerOutcome
from bonsai_fast.runs.layer_record import LayerRecord

FILE = "reconstruct.json"


@dataclass
class LayerOutcomes:
    """The layers that are done.

    Attributes:
        folder: of the task.
        held_out_before: next-token loss of the student as it was given; None at the first start.
        seconds: wall time of all starts until the last layer was done.
        layers: what the training of each layer came to, by its number.
        rejected: next-token loss with the new weights, if they were given up for it.
    """

    folder: Path
    held_out_before: float | None = None
    seconds: float = 0.0
    layers: dict[int, LayerOutcome] = field(default_factory=dict)
    rejected: float | None = None

    @classmethod
    def read(cls, folder: Path) -> LayerOutcomes:
        """Those of an earlier start, if there was one."""
        path = folder / FILE
        if not path.is_file():
            return cls(folder)
        found = json.loads(path.read_text())
        layers = {each["layer"]: LayerOutcome(**each) for each in found["layers"]}
        return cls(folder, found["held_out_before"], found["seconds"], layers, found["rejected"])

    @property
    def record(self) -> LayerRecord:
        """New weights of layers; those of a layer that kept its own are an empty file."""
        return LayerRecord(self.folder / "layers")

    def weights_of(self, number: int) -> dict[str, Tensor] | None:
        """New weights of a layer by their names in the model; None if it is not done.

        Raises:
            LedgerError: the record is damaged.
        """
        return self.record.find(number) if number in self.layers else None

    def save(self) -> None:
        write_json(
            self.folder / FILE,
            {
                "held_out_before": self.held_out_before,
                "seconds": self.seconds,
                "rejected": self.rejected,
                "layers": [asdict(outcome) for outcome in self.layers.values()],
            },
        )

    def add(self, outcome: LayerOutcome, weights: Mapping[str, Tensor], seconds: float) -> None:
        """A layer is done.

        Args:
            outcome: of its training.
            weights: its new ones by their names in the model; none if it keeps its own.
            seconds: wall time of all starts so far.
        """
        self.layers[outcome.layer] = outcome
        self.seconds = seconds
        # in this order: a layer on record is not trained again, and needs its outcome
        self.save()
        self.record.save(outcome.layer, weights)

    def reject(self, held_out: float, seconds: float) -> None:
        """Give all new weights up, for the loss that the student has with them."""
        self.rejected, self.seconds = held_out, seconds
        self.save()
        for number in self.layers:
            self.record.save(number, {})
