"""What the parent says of the text: its last hidden states, computed when needed or kept on disk.

Its LM head is applied to them in the loss, so nothing is lost, and a token takes one hidden state:
8 kB for a 7B model, where its logits would take 64 kB or more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bonsai_fast.files import write_json
from bonsai_fast.recovery.distill.processes import Processes
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.scoring.sequence_nll import evaluation_mode

# sequences between two notes of how far the cache is filled
SAVED_EVERY = 32


class TeacherStates(Protocol):
    """Gives the parent's last hidden states."""

    def __call__(self, numbers: Tensor) -> Tensor:
        """Of the sequences with these numbers, int64 [n] -> [n, T, D] on the parent's device."""


class LiveStates:
    """Runs the parent whenever it is asked.

    Args:
        nll: of the parent.
        input_ids: int64 [B, T] on the CPU.
        rows: sequences that are run at once. One by one, a sequence's states do not depend on those
            beside it; they are then the same to the bit, however they are asked for.
    """

    def __init__(self, nll: SequenceNLL, input_ids: Tensor, *, rows: int = 1) -> None:
        self._nll, self._input_ids, self._rows = nll, input_ids, rows

    @torch.no_grad()
    def __call__(self, numbers: Tensor) -> Tensor:
        """See `TeacherStates`."""
        with evaluation_mode(self._nll.model):
            parts = self._input_ids[numbers].to(self._nll.model.device).split(self._rows)
            return torch.cat([self._nll.states(part) for part in parts])


class CachedStates:
    """Reads states from a file that is filled before the first use.

    Args:
        folder: where teacher-states.bin and teacher-states.json are kept.
        shape: B, T and D.
        dtype: of the states.
        identity: plain values that name the parent and the text; a file of others is replaced.
        device: where states are returned.
        processes: each fills its share.
    Raises:
        OSError: the disk has no room.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        identity: dict[str, Any],
        device: torch.device,
        processes: Processes,
    ) -> None:
        self._path, self._processes, self._device = folder / "teacher-states.bin", processes, device
        self._about = folder / f"teacher-states-{processes.index}.json"
        self._shape = shape
        self._identity = {**identity, "shape": list(shape), "processes": processes.count}
        if processes.is_main:
            with open(self._path, "ab") as file:
                # writing to a mapping on a full disk kills the process: reserve the room first
                os.posix_fallocate(file.fileno(), 0, prod(shape) * dtype.itemsize)
        processes.wait()
        size = prod(shape)
        self._states = torch.from_file(str(self._path), shared=True, size=size, dtype=dtype)
        self._states = self._states.view(shape)

    @property
    def share(self) -> int:
        """Number of sequences that this process computes."""
        return len(range(self._processes.index, self._shape[0], self._processes.count))

    @property
    def filled(self) -> int:
        """Number of sequences of this process's share that are on the disk."""
        try:
            about = json.loads(self._about.read_text())
        except (OSError, ValueError):
            return 0
        matches = isinstance(about, dict) and about.get("identity") == self._identity
        return int(about["filled"]) if matches else 0

    def fill(self, live: TeacherStates, *, rows: int, advance: Callable[[int], None]) -> None:
        """Compute what is missing, `rows` sequences at a time.

        Args:
            live: computes states.
            rows: sequences per call.
            advance: called with a number of further sequences that are done.
        Raises:
            ValueError: the states are in another dtype, so that they would be rounded.
        """
        mine = torch.arange(self._processes.index, self._shape[0], self._processes.count)
        done = saved = self.filled
        advance(done)
        while done < len(mine):
            numbers = mine[done : done + rows]
            states = live(numbers)
            if states.dtype != self._states.dtype:
                raise ValueError(
                    f"the parent's hidden states are {states.dtype}, its weights "
                    f"{self._states.dtype}; use --recover-teacher live"
                )
            self._states[numbers] = states.cpu()
            done += len(numbers)
            advance(len(numbers))
            if done - saved >= SAVED_EVERY or done == len(mine):
                self._save(done)
                saved = done
        self._processes.wait()

    def __call__(self, numbers: Tensor) -> Tensor:
        """See `TeacherStates`."""
        return self._states[numbers].to(self._device)

    def _save(self, done: int) -> None:
        with open(self._path, "rb+") as file:
            os.fsync(file.fileno())
        write_json(self._about, {"identity": self._identity, "filled": done})


def states_bytes(sequences: int, length: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Size of the file of `CachedStates`, bytes."""
    return sequences * length * hidden_size * dtype.itemsize
