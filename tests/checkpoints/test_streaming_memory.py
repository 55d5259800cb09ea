"""A streamed model takes little memory, as the operating system counts it.

Measured in a process of its own, this file as a script; see tests/test_memory.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bonsai_fast as bf
from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.scoring import MaskScorer

MIB = 2**20
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
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loss = score(MaskScorer(bf.open_streamed(directory, device="cpu"), memory_budget=BUDGET))
    return {"peak": _resident("VmHWM") - before, "loss": loss}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_model_is_scored_in_far_less_memory_than_its_weights_take(tmp_path: Path) -> None:
    """24 layers of 14 MB: keeping them would show."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=2000, **sizes, **heads, dtype="bfloat16")
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config).eval()
    noise = torch.randn(4096 * 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, empty in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        data = 0.05 * noise[: empty.numel()].roll(len(name)).view(empty.shape)
        data = torch.ones_like(data) if data.dim() == 1 else data
        setattr(model.get_submodule(module), attribute, torch.nn.Parameter(data))
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    weights = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(tmp_path)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    stream = stream_of(bf.open_streamed(tmp_path, device="cpu"))
    assert stream is not None
    allowed = stream.resident_bytes + EMBEDDINGS + BUDGET + SLACK
    assert weights > 300 * MIB and allowed < 0.4 * weights
    assert stream.resident_bytes < found["peak"] < allowed, found
    assert found["loss"] == pytest.approx(score(MaskScorer(model, memory_budget=BUDGET)), rel=1e-6)


if __name__ == "__main__":
    print(json.dumps(peak_while_scoring(sys.argv[1])))
