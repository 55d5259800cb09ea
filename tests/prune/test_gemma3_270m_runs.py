"""A real Gemma 3 through the default command, and what can be made of the result."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import run_command
from gemma3_270m import INSTALL, gemma3_270m, is_installed
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_fast.export.__main__ import main as export_main
from bonsai_fast.prune.__main__ import main

FEW = ["--num-sequences", 2, "--sequence-length", 64, "--evaluation-tokens", 512]


@pytest.mark.slow
@pytest.mark.skipif(not is_installed, reason=INSTALL)
def test_a_fifth_is_removed_by_the_default_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, output = gemma3_270m(), tmp_path / "run"
    code, out, err = run_command(main, capsys, parent, "--sparsity", 0.2, "--output", output, *FEW)
    assert code == 0, err  # the saved model gave the same logits in a process of its own
    result = json.loads(out.splitlines()[-1])
    assert result["sparsity"] == pytest.approx(0.2, abs=0.002)
    assert result["dense_perplexity"] < 40
    assert result["pruned_perplexity"] < 20 * result["dense_perplexity"]

    model = AutoModelForCausalLM.from_pretrained(output / "model", dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert type(model).__name__ == "BonsaiGemma3ForCausalLM"
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    several = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*several)
    assert math.isfinite(float(model(**inputs).logits.float().sum()))

    export = partial(run_command, export_main, capsys, output)
    code, _, err = export("--format", "decilm", "--output", tmp_path / "decilm")
    assert code == 2 and err.count("\n") == 1 and "LLaMA" in err
    assert not (tmp_path / "decilm").exists()
