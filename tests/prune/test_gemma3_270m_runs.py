"""A real Gemma 3 through the default command, and what can be made of the result."""

from __future__ import annotations

import json
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
    assert result["dense_perplexity"] < 20
    assert result["pruned_perplexity"] < 3 * result["dense_perplexity"]

    model = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert type(model).__name__ == "BonsaiGemma3ForCausalLM"
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    several = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*several)

    export = partial(run_command, export_main, capsys, output)
    for name, reason in (("decilm", "LLaMA"), ("gguf", "--format padded")):
        code, _, err = export("--format", name, "--output", tmp_path / name)
        assert code == 2 and err.count("\n") == 1 and reason in err
        assert not (tmp_path / name).exists()
    code, _, err = export("--format", "padded", "--output", tmp_path / "padded")
    assert code == 0, err
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded", dtype=torch.float32).eval()
    assert type(padded).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        found, expected = (each(**inputs).logits for each in (padded, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
