"""The ledger: entries are found again, damage is noticed, a full disk leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from bonsai_fast.files import write_atomically
from bonsai_fast.runs.ledger import Ledger, LedgerError


def masks(count: int = 3, units: int = 21, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, units, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_what_was_appended_is_found_again(tmp_path: Path) -> None:
    keep, losses = masks(), torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [3.0, 4.0]])
    first = Ledger(tmp_path, 21)
    first.append("round-01", "text", keep, losses)
    for ledger in (first, Ledger(tmp_path, 21)):
        found = ledger.find("text", keep)
        assert found is not None
        torch.testing.assert_close(found, losses, rtol=0, atol=0, equal_nan=True)
        assert ledger.find("other text", keep) is None
        assert ledger.find("text", keep.flip(0)) is None
        assert ledger.find("text", masks(seed=1)) is None
        assert [entry.stage for entry in ledger.entries] == ["round-01"]


def test_masks_and_losses_are_copied(tmp_path: Path) -> None:
    """A caller may reuse its buffers."""
    keep, losses = masks(), torch.ones(3, 2)
    ledger = Ledger(tmp_path, 21)
    ledger.append("s", "t", keep, losses)
    losses.zero_()
    assert (ledger.entries[0].losses == 1).all()


def test_damage_is_noticed(tmp_path: Path) -> None:
    Ledger(tmp_path, 21).append("s", "t", masks(), torch.ones(3, 2))
    path = next(tmp_path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(tmp_path, 21)
    path.write_bytes(content[:20])
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger(tmp_path, 21)


def test_another_layout_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path, 21).append("s", "t", masks(), torch.ones(3, 2))
    with pytest.raises(LedgerError, match="expected 22 units, found 21"):
        Ledger(tmp_path, 22)


def test_interrupted_write_is_forgotten(tmp_path: Path) -> None:
    Ledger(tmp_path, 21).append("s", "t", masks(), torch.ones(3, 2))
    (tmp_path / "000001.safetensors.tmp").write_bytes(b"half")
    assert len(Ledger(tmp_path, 21)) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["run.json"]
