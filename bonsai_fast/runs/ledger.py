"""The append-only record of every evaluation of a run.

An entry is one file, `ledger/NNNNNN.safetensors`: packed masks, losses, and the hash of their text.
It is written to a temporary file, flushed and renamed, so a crash loses at most the entry being
written. A checksum over its content detects damage. Entries are never changed or removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bonsai_fast.files import write_atomically
from bonsai_fast.models.submodels import pack, unpack


class LedgerError(ValueError):
    """A record is damaged or does not belong to this run."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Scored sub-models.

    Attributes:
        stage: step of the method that needed them, such as "round-03/search".
        text: hash of the sequences.
        keep: bool [n, P].
        losses: float32 [n, B], nats per predicted token.
    """

    stage: str
    text: str
    keep: torch.Tensor
    losses: torch.Tensor


class Ledger:
    """All entries of one run directory, in memory and on disk.

    Args:
        directory: folder of the entries; created if it does not exist.
        num_units: P of the run's layout.
    Raises:
        LedgerError: an entry is damaged or has another number of units.
    """

    def __init__(self, directory: Path, num_units: int) -> None:
        self.directory = directory
        self.num_units = num_units
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("*.tmp"):
            stale.unlink()
        self._entries = list(read_entries(directory, num_units))
        self._by_key = {_key(entry.text, entry.keep): entry for entry in self._entries}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry, oldest first."""
        return tuple(self._entries)

    def find(self, text: str, keep: torch.Tensor) -> torch.Tensor | None:
        """Losses [n, B] of one entry with exactly these sub-models, bool [n, P], or None."""
        entry = self._by_key.get(_key(text, keep))
        return None if entry is None else entry.losses

    def find_each(self, text: str, keep: torch.Tensor) -> torch.Tensor | None:
        """Losses [n, B] of these sub-models, bool [n, P], collected from all entries, or None.

        Equal to `find` up to rounding: the other sub-models of a batch may change the last bits.
        """
        rows: dict[bytes, torch.Tensor] = {}
        for entry in self._entries:
            if entry.text == text:
                masks = pack(entry.keep).numpy()
                rows.update(zip(map(bytes, masks), entry.losses, strict=True))
        wanted = [bytes(mask) for mask in pack(keep).numpy()]
        if any(mask not in rows for mask in wanted):
            return None
        return torch.stack([rows[mask] for mask in wanted])

    def append(self, stage: str, text: str, keep: torch.Tensor, losses: torch.Tensor) -> None:
        """Record scored sub-models durably.

        Raises:
            OSError: the disk is full or the folder is not writable; no partial file is left.
        """
        entry = Entry(stage, text, keep.clone(), losses.clone())
        tensors = {"keep": pack(keep), "losses": losses.contiguous()}
        metadata = {
            "stage": stage,
            "text": text,
            "num_units": str(self.num_units),
            "checksum": _checksum(tensors),
        }
        write_atomically(
            self.directory / f"{len(self._entries):06d}.safetensors", save(tensors, metadata)
        )
        self._entries.append(entry)
        self._by_key[_key(text, keep)] = entry


def read_entries(directory: Path, num_units: int) -> Iterator[Entry]:
    """Read a ledger without locking it: a run may be writing to it.

    Args:
        directory: folder of the entries.
        num_units: P of the run's layout.
    Returns:
        every entry, oldest first.
    Raises:
        LedgerError: an entry is damaged or has another number of units.
    """
    for path in sorted(directory.glob("*.safetensors")):
        yield _read(path, num_units)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(text: str, keep: torch.Tensor) -> str:
    return hashlib.sha256(text.encode() + pack(keep).numpy().tobytes()).hexdigest()


def _read(path: Path, num_units: int) -> Entry:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("keep", "losses")}
    except (SafetensorError, OSError) as error:
        raise LedgerError(f"ledger entry {path} cannot be read: {error}") from error
    if metadata.get("checksum") != _checksum(tensors):
        raise LedgerError(
            f"ledger entry {path} is damaged: its checksum does not match; "
            f"delete the run to start over"
        )
    if int(metadata["num_units"]) != num_units:
        raise LedgerError(
            f"ledger entry {path}: expected {num_units} units, found {metadata['num_units']}"
        )
    return Entry(
        metadata["stage"],
        metadata["text"],
        unpack(tensors["keep"], num_units),
        tensors["losses"],
    )
