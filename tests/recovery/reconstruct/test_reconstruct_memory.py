"""Reconstruction takes the memory of one layer, however many there are.

Measured in a process of its own, this file as a script; see tests/scoring/test_scoring_memory.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from large_parent import HAS_PEAK, MIB, in_a_process_of_its_own
from tiny import byte_tokenizer, tiny_llama

from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.models.layout import Layout
from bonsai_fast.recovery import RecoveryTask
from bonsai_fast.recovery.reconstruct import Reconstruct
from bonsai_fast.surgery import remove_units

# float32: weights, gradients and two moments of AdamW; the weights that were best, in the model's
# dtype, and those at work; the file of the layer
COPIES = 7


def peaks(folder: str) -> dict[str, int]:
    """Peak memory for 2 and for 6 layers, and the size of a layer, bytes."""
    found = {}
    for layers in (2, 2, 6):  # the first loads code
        found[str(layers)], found["layer"] = peak_of(layers, Path(folder))
    return found


def peak_of(layers: int, folder: Path) -> tuple[int, int]:
    """Peak of a model with so many layers beside itself and its parent, and the size of a layer."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "head_dim": 32,
    }
    teacher = tiny_llama(num_hidden_layers=layers, **sizes)
    layout = Layout.of(teacher)
    keep = torch.tensor([unit.kind != "channel" or unit.index % 8 > 0 for unit in layout])
    student = remove_units(teacher, layout, keep)
    own = folder / f"{layers}-{len(list(folder.iterdir()))}"
    own.mkdir()
    ids = torch.randint(258, (6, 32), generator=torch.Generator().manual_seed(0))
    record = Reconstruct().run(
        RecoveryTask(
            student=student,
            teacher=teacher,
            tokenizer=byte_tokenizer(),
            text=Sequences(ids[:4], "random", "tokens"),
            held_out=Sequences(ids[4:], "random", "tokens"),
            options=RecoverOptions(recover="reconstruct", recover_tokens=4 * 4 * 32),
            seed=0,
            folder=own,
            reporter=Reporter(quiet=True),
            memory_budget="64MiB",
        )
    )
    assert record.peak_bytes is not None
    layer = sum(x.numel() * x.element_size() for x in student.model.layers[0].parameters())
    return record.peak_bytes, layer


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's /proc")
def test_peak_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    found = in_a_process_of_its_own(__file__, tmp_path)
    few, many, layer = found["2"], found["6"], found["layer"]
    assert layer > 5 * MIB
    assert 4 * layer < many < COPIES * layer + 12 * MIB, found
    assert many < few + 1.5 * layer, found


if __name__ == "__main__":
    print(json.dumps(peaks(sys.argv[1])))
