"""The embedded model: made from its package once, an ordinary checkpoint, pruned by the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import run_command
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_fast.checkpoints.embedded import embedded_model
from bonsai_fast.delivery import deliver
from bonsai_fast.latency.timing import measure_latency
from bonsai_fast.prune.__main__ import main

# `make setup` installs the package; without it these tests fail and say how to get it.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def checkpoint(embedded_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(embedded_cache))
    return embedded_model()


def test_it_is_an_ordinary_checkpoint(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_its_card_repeats_what_the_gguf_states(checkpoint: Path) -> None:
    card = ModelCard.load(checkpoint / "README.md").data
    assert card.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.license == "apache-2.0" and card.language == ["en"]


def test_it_speaks_english(checkpoint: Path) -> None:
    """Weights that were read in a wrong order would not."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=2, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer).strip().startswith("Paris")


def test_it_is_made_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bonsai_fast.checkpoints.embedded.PACKAGE", "no_such_package_here")
    assert embedded_model() == checkpoint
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_the_command_without_a_model_prunes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's first command on little text: smaller than its parent, better than a guess."""
    monkeypatch.chdir(tmp_path)
    # speeds are measured once; that they need more rounds is a matter of precision
    monkeypatch.setattr(deliver, "measure_latency", partial(measure_latency, rounds=1))
    flags = "--sparsity 0.2 --num-sequences 4 --sequence-length 32 --evaluation-tokens 512 "
    flags += "--recover none"  # that takes longer than all the rest
    code, out, err = run_command(main, capsys, *flags.split(), "--output", "run")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["parameters_dense"] == 134_515_008
    assert 0.995 * 0.2 <= result["sparsity"] <= 0.2
    assert (
        result["parameters"]
        == AutoModelForCausalLM.from_pretrained(
            tmp_path / "run" / "model", trust_remote_code=True
        ).num_parameters()
    )
    assert result["dense_perplexity"] < result["pruned_perplexity"] < 49_152
