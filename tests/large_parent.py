"""A model whose layers show in the memory of a process, and that memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20
HAS_PEAK = Path("/proc/self/clear_refs").exists()


def large_parent(vocab_size: int = 2000) -> LlamaForCausalLM:
    """24 layers of 14 MB in bfloat16; all weights are rolled copies of the same noise."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LlamaConfig(vocab_size=vocab_size, **sizes, **heads, **tokens, dtype="bfloat16")
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config).eval()
    noise = torch.randn(4096 * 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, empty in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        data = 0.05 * noise[: empty.numel()].roll(len(name)).view(empty.shape)
        data = torch.ones_like(data) if data.dim() == 1 else data
        setattr(model.get_submodule(module), attribute, torch.nn.Parameter(data))
    return model


def weight_bytes_on_disk(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def forget_peak() -> int:
    """Bytes that the process has now; the peak starts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """A figure of this process in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def in_a_process_of_its_own(script: str, *arguments: object) -> dict[str, Any]:
    """What a script prints as JSON in its last line; freed memory is given back there at once."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-P", script, *map(str, arguments)],
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
