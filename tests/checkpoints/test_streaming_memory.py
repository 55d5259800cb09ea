"""A streamed model takes little memory, as the operating system counts it.

Measured in a process of its own, this file as a script; see tests/scoring/test_scoring_memory.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from large_parent import (
    HAS_PEAK,
    MIB,
    forget_peak,
    in_a_process_of_its_own,
    large_parent,
    resident,
    weight_bytes_on_disk,
)

import bonsai_fast as bf
from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.scoring import MaskScorer

BUDGET = 32 * MIB
# code that is loaded on first use, and a block of a file
SLACK = 48 * MIB
EMBEDDINGS = 2 * 2000 * 512 * 2


def score(scorer: MaskScorer) -> float:
    """Loss of some sub-models, summed."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(6, len(scorer.layout), generator=generator) < 0.8
    return float(scorer.score(keep, torch.arange(64).view(2, 32)).sum())


def peak_while_scoring(directory: str) -> dict[str, float]:
    """Opened and scored: the loss, and the peak beside what the process had."""
    before = forget_peak()
    loss = score(MaskScorer(bf.open_streamed(directory, device="cpu"), memory_budget=BUDGET))
    return {"peak": resident("VmHWM") - before, "loss": loss}


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's /proc")
def test_a_model_is_scored_in_far_less_memory_than_its_weights_take(tmp_path: Path) -> None:
    """24 layers of 14 MB: keeping them would show."""
    model = large_parent()
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    found = in_a_process_of_its_own(__file__, tmp_path)
    stream = stream_of(bf.open_streamed(tmp_path, device="cpu"))
    assert stream is not None
    allowed = stream.resident_bytes + EMBEDDINGS + BUDGET + SLACK
    weights = weight_bytes_on_disk(tmp_path)
    assert weights > 300 * MIB and allowed < 0.4 * weights
    assert stream.resident_bytes < found["peak"] < allowed, found
    assert found["loss"] == pytest.approx(score(MaskScorer(model, memory_budget=BUDGET)), rel=1e-6)


if __name__ == "__main__":
    print(json.dumps(peak_while_scoring(sys.argv[1])))
