"""A run that zeroes weights on a streamed model is the run on the loaded one: same files."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

import bonsai_fast as bf
from bonsai_fast.checkpoints import load as loading
from bonsai_fast.checkpoints.memory import weight_bytes
from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model
from bonsai_fast.prune.__main__ import main
from bonsai_fast.runs.directory import WeightRun
from bonsai_fast.runs.layer_record import LayerRecord

FLAGS = (
    *("--calibration", "builtin", "--num-sequences", "4", "--sequence-length", "32"),
    *("--evaluation-tokens", "256", "--device", "cpu"),
)
SMALL = {"num_sequences": 4, "sequence_length": 32, "evaluation_tokens": 256}
SPARSEGPT = {"method": "sparsegpt", "pattern": "2:4"}
command = partial(run_command, main)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_parent(tmp_path_factory.mktemp("parent") / "model")


@pytest.fixture(autouse=True)
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded runs load their result in a fresh process, which tests/prune/test_weight_runs has."""
    monkeypatch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)


def prune(model: PreTrainedModel, output: Path, **options: Any) -> bf.SparseResult:
    config = bf.configure(**SMALL, **options)
    reporter = Reporter(quiet=True)
    result = bf.prune(model, byte_tokenizer(), config, output_dir=output, reporter=reporter)
    assert isinstance(result, bf.SparseResult)
    return result


def loaded(parent: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(parent, dtype="auto")


def files(output: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(output).iterdir()}


def same(result: bf.SparseResult) -> dict[str, Any]:
    """What does not depend on places and times."""
    apart = {"output", "run", "seconds", "pruning_seconds", "max_logit_difference"}
    return {name: value for name, value in asdict(result).items() if name not in apart}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda", "pattern": "2:4"},
        {"method": "sparsegpt", "sparsity": 0.3},
        {"method": "magnitude"},
    ],
    ids=lambda options: options["method"],
)
def test_same_bytes_as_loaded(options: dict[str, Any], parent: Path, tmp_path: Path) -> None:
    """From disk and from host memory; no layer of either model stays in memory."""
    expected = prune(loaded(parent), tmp_path / "loaded", **options)
    models = {
        "disk": bf.open_streamed(parent, device="cpu"),
        "host": bf.stream_layers(loaded(parent), device="cpu"),
    }
    for name, model in models.items():
        result = prune(model, tmp_path / name, **options)
        assert same(result) == same(expected) and result.zeros > 0
        assert files(result.output) == files(expected.output)
        assert result.max_logit_difference < 1e-5
        left = {path.name for path in (tmp_path / name).iterdir()}
        assert left == {"run.json", "model", "report.html"}
        # the parent has its own weights again
        tokens = torch.arange(32)[None]
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, loaded(parent)(tokens).logits)


def test_the_command(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--method", "wanda", "--pattern", "2:4", "--output", tmp_path / "run"]
    code, out, err = command(capsys, parent, "--stream", *flags, "--plan")
    plan = json.loads(out.splitlines()[-1])
    assert code == 0 and "streamed from disk" in err and not (tmp_path / "run").exists()
    code, out, err = command(capsys, parent, "--stream", *flags)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["zeros"] == plan["zeros"] and "same logits" in err
    # a loaded run takes it for its own
    code, out, err = command(capsys, parent, *flags)
    assert code == 0 and json.loads(out.splitlines()[-1]) == result and "nothing to do" in err


class Interrupted(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def whole(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> bf.SparseResult:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return prune(bf.open_streamed(parent, device="cpu"), output, **SPARSEGPT)


@pytest.mark.parametrize(
    ("owner", "name", "calls", "on_record"),
    [(LayerRecord, "save", 2, 2), (WeightRun, "record", 1, 4)],
    ids=["layers", "end"],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    owner: type,
    name: str,
    calls: int,
    on_record: int,
    parent: Path,
    whole: bf.SparseResult,
    tmp_path: Path,
) -> None:
    """Streamed or loaded, whatever it was before."""
    real, count = getattr(owner, name), []

    def once(*arguments: Any, **keywords: Any) -> Any:
        count.append(name)
        if len(count) > calls:
            raise Interrupted
        return real(*arguments, **keywords)

    for resumed in ("streamed", "loaded"):
        count.clear()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(owner, name, once)
            prune(bf.open_streamed(parent, device="cpu"), tmp_path / resumed, **SPARSEGPT)
        assert len(list((tmp_path / resumed / "layers").iterdir())) == on_record
        model = loaded(parent) if resumed == "loaded" else bf.open_streamed(parent, device="cpu")
        result = prune(model, tmp_path / resumed, **SPARSEGPT)
        assert files(result.output) == files(whole.output)
        assert (result.tokens > 0) == (name == "save")


def test_measured_again_without_pruning(parent: Path, tmp_path: Path) -> None:
    """The weights come from the saved model, which is then written anew."""
    model = bf.open_streamed(parent, device="cpu")
    first = prune(model, tmp_path / "run", method="wanda")
    before = files(first.output)["model.safetensors"]
    config = bf.configure(**{**SMALL, "evaluation_tokens": 512}, method="wanda")
    other = bf.prune(
        model, byte_tokenizer(), config, output_dir=tmp_path / "run", reporter=Reporter(quiet=True)
    )
    assert isinstance(other, bf.SparseResult)
    assert other.tokens == 0 and other.protocol["tokens"] > first.protocol["tokens"]
    assert files(other.output)["model.safetensors"] == before and other.zeros == first.zeros


def test_what_does_not_fit_is_streamed(
    parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weight_bytes(parent)
    flags = [parent, "--plan", "--memory-budget", "16MB", "--method", "wanda", *FLAGS]
    for memory, streamed in ((weights + 16_000_000, False), (weights + 15_999_999, True)):
        monkeypatch.setattr(loading, "device_memory", lambda _, memory=memory: memory)
        code, _, err = command(capsys, *flags)
        assert code == 0 and ("does not fit into memory" in err) == streamed
        assert ("streamed from disk" in err) == streamed


def test_other_formats_are_streamed_from_host_memory(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU that is too small for a model which is not in safetensors: played by the CPU."""
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = []

    def stream_layers(model: PreTrainedModel, *, device: torch.device) -> PreTrainedModel:
        assert device.type == "cuda"
        found.append(bf.stream_layers(model, device="cpu"))
        return found[-1]

    monkeypatch.setattr(loading, "stream_layers", stream_layers)
    monkeypatch.setattr(loading, "find_device", torch.device)
    monkeypatch.setattr(loading, "device_memory", lambda _: 10**6)
    flags = [*FLAGS[:-1], "cuda", "--memory-budget", "16MB", "--method", "magnitude", "--plan"]
    code, _, err = command(capsys, tmp_path, *flags)
    assert code == 0 and "does not fit on the GPU" in err and "streamed from memory" in err
    assert stream_of(found[0]) is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibration", "self"], "calibration 'self': needs the whole model in memory"),
        (["--tasks", "piqa"], "tasks: needs the whole model in memory"),
        (["--pattern", "3:7"], "expected input widths that 7 divides, got 48"),
        (["--memory-budget", "1KB"], "one sequence of"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    flags: list[str],
    message: str,
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*FLAGS, "--method", "wanda", *flags, "--output", tmp_path / "run"]
    code, out, err = command(capsys, parent, "--stream", *options)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()
