"""What a notebook shows of the public objects: a few lines with the numbers that matter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer, tiny_llama

import bonsai_fast as bf
from bonsai_fast.console import Reporter
from bonsai_fast.delivery.pruned_model import SmallerModel

PROTOCOL = {"dataset": "builtin", "tokens": 511, "window": 512, "stride": 512, "sha256": "ab"}
COMMON: dict[str, Any] = {
    "output": "runs/one/model",
    "run": "runs/one",
    "sparsity": 0.5,
    "sparsity_total": 0.25,
    "parameters": 750_000,
    "dense_perplexity": 10.0,
    "pruned_perplexity": 12.5,
    "protocol": PROTOCOL,
    "tasks": {},
    "max_logit_difference": 0.0,
    "seconds": 1.0,
}


def prune_result(**changes: Any) -> bf.PruneResult:
    values = {"parameters_dense": 1_000_000, "latency": {}, "submodels_scored": 8}
    return bf.PruneResult(**{**COMMON, **values, "tokens_scored": 512, **changes})


def test_layout() -> None:
    assert repr(bf.Layout.of(tiny_llama(), attention="kv-group", sublayers=True)) == (
        "Layout(llama, 4 layers, units: 8 kv-group, 512 channel, 4 attention, 4 mlp; "
        "98,688 of 111,120 parameters in the decoder)"
    )


def test_mask_scorer() -> None:
    scorer = bf.MaskScorer(tiny_llama(), memory_budget="64MiB")
    assert repr(scorer) == (
        "MaskScorer(LlamaForCausalLM, 536 units, engine fused, float32 on cpu, "
        "memory budget 64 MiB)"
    )
    hooks = bf.MaskScorer(tiny_llama().bfloat16(), engine="hooks")
    assert "engine hooks, bfloat16 on cpu" in repr(hooks)


def test_prune_result() -> None:
    assert repr(prune_result()).splitlines() == [
        "PruneResult: dense and pruned model",
        "                  dense   pruned  change",
        "  parameters  1,000,000  750,000  -25.0% (decoder -50.00%)",
        "  perplexity      10.00    12.50  x1.25",
        "  perplexity: builtin, 511 predicted tokens, window 512, stride 512",
        "  saved in runs/one/model",
    ]
    speed = {"prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 20.0}
    speed |= {"decode_tokens": 8, "prefill_tokens": 64}
    faster = {name: 2 * value for name, value in speed.items()}
    faster |= {"prefill_speedup": 2.0, "decode_speedup": 2.0}
    timed = repr(prune_result(latency={"dense": speed, "pruned": faster}))
    assert "  decode, tokens/s        20.0     40.0  x2.00" in timed.splitlines()
    assert "8 tokens after a prompt of 64" in timed


def test_sparse_result() -> None:
    result = bf.SparseResult(
        **COMMON,
        method="wanda",
        pattern="2:4",
        weights=500_000,
        zeros=250_000,
        zeros_dense=3,
        standard_error=0.1,
        tokens=512,
        pruning_seconds=0.5,
    )
    lines = repr(result).splitlines()
    assert lines[0] == "SparseResult: dense and pruned model: wanda, 2:4"
    assert lines[2] == (
        "  zeros           3  250,000  50.00% of 500,000 weights, 25.0% of the model"
    )
    assert bf.SparseResult(**asdict(result)) == result


def test_pruned_model(tmp_path: Path) -> None:
    parent = tiny_llama()
    keep = torch.ones(len(bf.Layout.of(parent)), dtype=torch.bool)
    keep[0] = False
    smaller = bf.remove_units(parent, bf.Layout.of(parent), keep)
    model = SmallerModel(
        parent, byte_tokenizer(), tmp_path / "model", Reporter(quiet=True), smaller
    )
    assert repr(model) == (
        f"SmallerModel(parent: LlamaForCausalLM with {parent.num_parameters():,} parameters, "
        f"saved in: {tmp_path / 'model'})"
    )
