"""A whole run with `recover=reconstruct`: cut, compensated, reconstructed, saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

import bonsai_fast as bf
from bonsai_fast.checkpoints.streaming import open_streamed
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model


@pytest.mark.parametrize("streamed", [False, True])
def test_both_tiers_run_and_the_result_is_saved(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)
    monkeypatch.setattr(pruned_model.SmallerModel, "measures_speed", False)
    Path("text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    model = tiny_llama(num_hidden_layers=2)
    model.save_pretrained("parent")
    config = bf.configure(
        method="wanda-sp",
        sparsity=0.4,
        num_sequences=8,
        sequence_length=32,
        evaluation_tokens=256,
        calibration="text.txt",
        recover="reconstruct",
        recover_tokens=20 * 512,
    )
    result = bf.prune(
        open_streamed("parent", device="cpu") if streamed else model,
        byte_tokenizer(),
        config,
        output_dir=tmp_path / "run",
        reporter=Reporter(quiet=True),
    )
    assert result.recovery is not None
    names = [tier["name"] for tier in result.recovery["tiers"]]
    assert names == ["compensate", "reconstruct"]
    last = result.recovery["tiers"][1]
    assert last["held_out_after"] <= last["held_out_before"]
    assert last["peak_bytes"] is None or last["peak_bytes"] > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.isfinite(x).all() for x in saved.parameters())
