"""Methods without a backward pass need the memory of inference, as the operating system counts it.

Each has a process of its own, this file as a script, for the reasons told in `test_memory.py`. The
model's weights are far larger than the budget for scoring: whatever holds a copy of them, stored
noise or gradients, shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

MIB = 2**20
BUDGET = 24 * MIB
# code that is loaded on first use, masks, statistics
SLACK = 8 * MIB
# what a method holds beside the budget, in layers of weights: mini-llm perturbs one at a time, puts
# it back from a copy, and makes the noise of one tensor in float32
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "policy-gradient": (0.0, {"rounds": 3, "submodels_per_round": 16}),
    "mini-llm": (2.0, {"directions": 3}),
}


def measure(method: str, options: dict[str, Any]) -> dict[str, int]:
    """Bytes of all prunable weights, of one layer's, and beside them at the peak of a search."""
    import torch
    from searches import new_search
    from transformers import LlamaConfig, LlamaForCausalLM

    from bonsai_fast.evaluation.peak_memory import PeakMemory
    from bonsai_fast.methods import METHODS

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes, **heads)).eval()
    layer = sum(weight.numel() * 4 for weight in model.model.layers[0].parameters())
    input_ids = torch.randint(512, (4, 64))

    def search(output: Path) -> None:
        start = new_search(
            model, output, input_ids=input_ids, method=method, sparsity=0.3,
            memory_budget=str(BUDGET), **options,
        )  # fmt: skip
        METHODS[method].find(start)

    with tempfile.TemporaryDirectory() as folder:
        search(Path(folder) / "first")  # code is loaded, threads are started
        with PeakMemory(model.device) as peak:
            search(Path(folder) / "second")
    assert peak.bytes is not None
    return {"weights": 16 * layer, "layer": layer, "peak": peak.bytes}


def measured(method: str, options: dict[str, Any]) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-P", __file__, method, json.dumps(options)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)


@pytest.mark.parametrize("method", CASES)
def test_a_search_holds_no_copy_of_the_model(method: str) -> None:
    layers, options = CASES[method]
    found = measured(method, options)
    allowed = BUDGET + layers * found["layer"] + SLACK
    assert found["peak"] <= allowed < 0.75 * found["weights"], found


def test_a_backward_pass_shows() -> None:
    """Taylor holds gradients, as it says: what the others must not do would be seen."""
    found = measured("taylor", {})
    assert found["peak"] > 0.9 * found["weights"], found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]))))
