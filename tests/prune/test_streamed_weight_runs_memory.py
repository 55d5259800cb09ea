"""A streamed run that zeroes weights takes little memory, as the operating system counts it.

Measured in a process of its own, this file as a script; see tests/scoring/test_scoring_memory.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from large_parent import (
    HAS_PEAK,
    MIB,
    forget_peak,
    in_a_process_of_its_own,
    large_parent,
    resident,
    weight_bytes_on_disk,
)
from tiny import byte_tokenizer, save_tiny_parent

from bonsai_fast.prune.__main__ import main

LAYER = 14 * MIB
# two slots each of the parent, of the saved model, and of the saved model read again; the pruned
# weights of a layer twice: as they are found, and as bytes of a file
LAYERS = 8 * LAYER
BUDGET = 16 * MIB
# temporaries of a matrix's scores, and the text
SLACK = 24 * MIB


def peak_while_pruning(warm_up: str, directory: str) -> dict[str, int]:
    """Peak of a whole Wanda run, beside what the process had after one of a tiny model."""
    prune(warm_up)  # code is loaded, threads are started
    before = forget_peak()
    prune(directory)
    return {"peak": resident("VmHWM") - before}


def prune(directory: str) -> None:
    """Run the command; its result is in the folder "run" of the model's directory."""
    flags = ["--method", "wanda", "--pattern", "2:4", "--stream", "--device", "cpu"]
    text = ["--num-sequences", "4", "--sequence-length", "32", "--evaluation-tokens", "128"]
    budget = ["--memory-budget", f"{BUDGET / 1e6}MB"]
    output = ["--output", f"{directory}/run"]
    assert main([directory, *output, *flags, *text, *budget]) == 0


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's /proc")
def test_a_model_is_pruned_in_far_less_memory_than_its_weights_take(tmp_path: Path) -> None:
    """From opening it to counting the zeros of the saved model."""
    parent, tiny = tmp_path / "parent", save_tiny_parent(tmp_path / "tiny")
    large_parent(vocab_size=258).save_pretrained(parent, max_shard_size="100MB")
    byte_tokenizer().save_pretrained(parent)
    found = in_a_process_of_its_own(__file__, tiny, parent)
    weights = weight_bytes_on_disk(parent)
    assert weights == pytest.approx(weight_bytes_on_disk(parent / "run" / "model"), rel=1e-3)
    assert 4 * LAYER < found["peak"] < LAYERS + BUDGET + SLACK < 0.5 * weights, found


if __name__ == "__main__":
    print(json.dumps(peak_while_pruning(*sys.argv[1:])))
