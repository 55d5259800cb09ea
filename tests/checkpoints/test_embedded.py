"""The embedded model: made from its package once, an ordinary checkpoint, pruned by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_fast.checkpoints.embedded import embedded_model

# `make setup` installs the package; without it these tests fail and say how to get it.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def checkpoint(cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return embedded_model()


def test_it_is_an_ordinary_checkpoint(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_it_speaks_english(checkpoint: Path) -> None:
    """Weights that were read in a wrong order would not."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=2, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer).strip().startswith("Paris")


def test_it_is_made_once(cache: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("bonsai_fast.checkpoints.embedded.PACKAGE", "no_such_package_here")
    assert embedded_model() == checkpoint
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_the_command_without_a_model_prunes_it(
    cache: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The README's first command on as little text as it takes: smaller and better than a guess."""
    flags = "--sparsity 0.2 --num-sequences 4 --sequence-length 32 --evaluation-tokens 512"
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "bonsai_fast.prune",
            *flags.split(),
            "--output",
            "run",
        ],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parameters_dense"] == 134_515_008
    assert 0.995 * 0.2 <= result["sparsity"] <= 0.2
    assert (
        result["parameters"]
        == AutoModelForCausalLM.from_pretrained(
            tmp_path / "run" / "model", trust_remote_code=True
        ).num_parameters()
    )
    assert result["dense_perplexity"] < result["pruned_perplexity"] < 49_152
