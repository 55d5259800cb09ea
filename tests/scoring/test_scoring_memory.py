"""Scoring stays within its memory budget, as the operating system counts it.

A process's peak cannot be told from what ran before it, so that each budget has a process of its
own: this file, as a script. There the C library is told to give freed memory back at once; by
itself it keeps up to about 100 MB, whatever the budget, which would hide what scoring holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bonsai_fast.scoring import EngineName

MIB = 2**20
# engine, budget in MiB, numbers of sub-models; the fused engine holds the states of as many
# sub-models as fit, and only the last two are more than that
CASES: list[tuple[EngineName, int, tuple[int, int, int]]] = [
    ("hooks", 16, (4, 32, 512)),
    ("hooks", 80, (4, 32, 512)),
    ("fused", 40, (4, 400, 600)),
]
# code that is loaded on first use, and the masks themselves
SLACK = 4 * MIB


def peak_while_scoring(engine: EngineName, budget: int, counts: list[int]) -> dict[int, int]:
    """Bytes beyond what was there before, at their highest, for every number of sub-models."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bonsai_fast.scoring import MaskScorer

    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, **sizes, **heads)).eval()
    scorer = MaskScorer(model, engine=engine, memory_budget=budget)
    input_ids = torch.randint(8000, (2, 64))

    def masks(count: int) -> torch.Tensor:
        return torch.rand(count, len(scorer.layout)) < 0.9

    scorer.score(masks(1), input_ids)  # code is loaded, threads are started
    peaks = {}
    for count in counts:
        keep = masks(count)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        scorer.score(keep, input_ids)
        peaks[count] = _resident("VmHWM") - before
    return peaks


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("engine", "mebibytes", "counts"), CASES)
def test_peak_stays_within_the_budget_however_many_submodels(
    engine: EngineName, mebibytes: int, counts: tuple[int, int, int]
) -> None:
    """A list of results, logits or masks that grows with S would show."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, engine, str(mebibytes * MIB), *map(str, counts)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = {int(count): peak for count, peak in json.loads(done.stdout).items()}
    assert tuple(peaks) == counts
    _, many, most = counts
    assert max(peaks.values()) <= mebibytes * MIB + SLACK, peaks
    # the budget is used: an estimate far too high would waste the machine
    assert peaks[most] > 0.3 * mebibytes * MIB, peaks
    assert peaks[most] <= 1.1 * peaks[many] + SLACK, peaks


if __name__ == "__main__":
    engine, budget, *counts = sys.argv[1:]
    print(json.dumps(peak_while_scoring(engine, int(budget), list(map(int, counts)))))
