"""Mask files: they say which layout they are of, and are the same bytes twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from surgery_cases import MASKS
from tiny import tiny_llama

from bonsai_fast.models.layout import Layout
from bonsai_fast.runs.mask_files import load_mask, save_mask


def test_masks_say_their_layout(tmp_path: Path) -> None:
    layout = Layout.of(tiny_llama(), attention="kv-group")
    keep = MASKS["half"](layout)
    save_mask(tmp_path / "mask", layout, keep)
    found = load_mask(tmp_path / "mask")
    assert torch.equal(found.keep, keep)
    assert (found.attention, found.sublayers) == ("kv-group", False)
    save_mask(tmp_path / "again", layout, keep)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "mask").read_bytes()
    with pytest.raises(ValueError, match="expected shape"):
        save_mask(tmp_path / "mask", layout, keep[1:])
    for about in ({}, {"attention": "x", "sublayers": True}, {"attention": "head"}, 8):
        about = {"num_units": 8, **about} if isinstance(about, dict) else about
        keep_bits = {"keep": torch.zeros(1, 1, dtype=torch.uint8)}
        (tmp_path / "bad").write_bytes(save(keep_bits, {"layout": json.dumps(about)}))
        with pytest.raises(ValueError, match="expected a mask written by bonsai_fast"):
            load_mask(tmp_path / "bad")


def test_mask_files_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a mask written by bonsai_fast"):
        load_mask(tmp_path / "x.safetensors")
