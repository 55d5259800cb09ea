"""Weights of decoder layers that are not saved in a model yet: one file per layer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bonsai_fast.files import write_atomically
from bonsai_fast.runs.ledger import LedgerError


@dataclass(frozen=True)
class LayerRecord:
    """A directory of NNNN.safetensors.

    Attributes:
        path: the directory; made when the first layer is saved.
    """

    path: Path

    def has(self, number: int) -> bool:
        """Whether a decoder layer is on record; it is not read."""
        return self._path(number).is_file()

    def find(self, number: int) -> dict[str, Tensor] | None:
        """Weights of a decoder layer by parameter name, on the CPU; None if it is not on record.

        Raises:
            LedgerError: the record is damaged.
        """
        if not self.has(number):
            return None
        path = self._path(number)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise LedgerError(
                f"{path} cannot be read: {error}; delete it to compute that layer again"
            ) from error

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """The same of a decoder layer that must be on record.

        Raises:
            LedgerError: the record is damaged or missing.
        """
        weights = self.find(number)
        if weights is None:
            path = self._path(number)
            raise LedgerError(
                f"{path} is missing; run the same command again to compute that layer"
            )
        return weights

    def save(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """Record the weights of a decoder layer."""
        path = self._path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({name: x.contiguous().cpu() for name, x in weights.items()}))

    def drop(self) -> None:
        """Delete all records: a saved model holds these weights."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.path / f"{number:04d}.safetensors"
