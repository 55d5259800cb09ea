"""Runs whose pruned model is trained before it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

import bonsai_fast as bf
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A short text; no fresh process and no timing, which take longer than these runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))
    monkeypatch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)
    monkeypatch.setattr(pruned_model.SmallerModel, "measures_speed", False)


def saved(output: Path, **options: object) -> tuple[dict[str, torch.Tensor], Any]:
    """Prune the tiny LLaMA; weights of the saved model, and what recovery reports."""
    small = {"num_sequences": 4, "sequence_length": 32, "evaluation_tokens": 256}
    config = bf.configure(**{**small, "calibration": "text.txt", **options})
    quiet = Reporter(quiet=True)
    result = bf.prune(tiny_llama(), byte_tokenizer(), config, output_dir=output, reporter=quiet)
    return AutoModelForCausalLM.from_pretrained(output / "model").state_dict(), result.recovery


def test_zeroed_weights_are_zero_in_the_saved_model(tmp_path: Path) -> None:
    options = {"method": "wanda", "pattern": "2:4"}
    before, _ = saved(tmp_path / "plain", **options, recover="none")
    training = {"recover": "distill", "recover_tokens": 1024, "recover_cross_entropy": 1.0}
    after, recovery = saved(tmp_path / "run", **options, **training)
    changed = 0
    for name, weight in before.items():
        if "_proj" in name:
            assert bool((after[name] == 0)[weight == 0].all()), name
            assert int((after[name].view(-1, 4) == 0).sum(dim=1).min()) >= 2, name
            changed += int((after[name] != weight).sum())
        else:
            assert torch.equal(after[name], weight), name
    (tier,) = recovery["tiers"]
    assert changed and tier["held_out_after"] < tier["held_out_before"]
    assert any("zeros of the sparse weights are kept" in note for note in tier["notes"])


def test_a_published_recipe_after_its_pruning(tmp_path: Path) -> None:
    options = {"method": "mini-llm", "sparsity": 0.3, "directions": 4}
    training = {"recover": "mini-llm", "recover_tokens": 2048}
    after, recovery = saved(tmp_path / "run", **options, **training)
    assert recovery["tiers"][0]["settings"]["rank"] == 8
    assert recovery["tiers"][0]["held_out_after"] < recovery["tiers"][0]["held_out_before"]
    assert all(torch.isfinite(weight).all() for weight in after.values())
