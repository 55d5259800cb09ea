"""A run on a streamed model is the run on the loaded one: same plan, same cut, same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama

import bonsai_fast as bf
from bonsai_fast.checkpoints import load as loading
from bonsai_fast.checkpoints.memory import device_memory, weight_bytes
from bonsai_fast.prune.__main__ import main
from bonsai_fast.runs.ledger import Ledger
from bonsai_fast.runs.mask_files import load_mask

SMALL = (
    *("--calibration", "builtin", "--num-sequences", "8", "--sequence-length", "32"),
    *("--evaluation-tokens", "256", "--sparsity", "0.2", "--device", "cpu", "--recover", "none"),
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_parent(tmp_path_factory.mktemp("parent") / "model")


@pytest.fixture(scope="module")
def loaded(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that loaded the model."""
    output = tmp_path_factory.mktemp("loaded") / "run"
    assert main([str(parent), "--output", str(output), *SMALL]) == 0
    return output


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, object], str]:
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def files(run: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (run / "model").iterdir()
        if path.suffix == ".safetensors"
        or path.name in ("config.json", "bonsai_report.json", "README.md")
    }


def test_same_result_as_loaded(
    parent: Path, loaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([str(parent), "--stream", "--output", str(tmp_path / "run"), *SMALL])
    result, err = last_line(capsys)
    assert code == 0 and "prefill" not in err
    expected = json.loads((loaded / "run.json").read_text())["result"]
    same = ("sparsity", "parameters", "dense_perplexity", "pruned_perplexity", "protocol")
    assert {name: result[name] for name in same} == {name: expected[name] for name in same}
    assert result["latency"] == {} and result["max_logit_difference"] < 1e-3
    masks = [load_mask(run / "masks" / "final.safetensors") for run in (loaded, tmp_path / "run")]
    assert torch.equal(masks[0].keep, masks[1].keep)
    found = files(tmp_path / "run")
    assert len(found) == 4 and found == files(loaded)
    (tmp_path / "run" / "model" / "tokenizer.json").stat()


def test_a_loaded_run_goes_on_streamed(
    parent: Path, loaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too large to be cut in memory after all: nothing need be scored again."""
    run = shutil.copytree(loaded, tmp_path / "run")
    other = [argument if argument != "0.2" else "0.3" for argument in SMALL]
    code = main([str(parent), "--stream", "--output", str(run), *other])
    result, err = last_line(capsys)
    assert code == 0 and "from its recorded scores" in err
    assert result["submodels_scored"] == 0 and result["sparsity"] == pytest.approx(0.3, abs=0.02)


def test_losses_are_found_in_other_company(tmp_path: Path) -> None:
    """Streamed calls hold more sub-models than others."""
    ledger = Ledger(tmp_path, 9)
    keep = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    losses = torch.arange(12.0).view(6, 2)
    ledger.append("a", "text", keep[:4], losses[:4])
    ledger.append("b", "text", keep[4:], losses[4:])
    ledger.append("b", "other text", keep, losses + 100)
    again, order = Ledger(tmp_path, 9), torch.tensor([5, 0, 3])
    assert again.find("text", keep[order]) is None
    assert torch.equal(again.find_each("text", keep[order]), losses[order])
    assert again.find_each("text", ~keep[:1]) is None and again.find_each("no", keep) is None


def test_dtype(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--stream", "--dtype", "bfloat16", "--method", "magnitude-l2", *SMALL]
    assert main([str(parent), "--output", str(tmp_path / "run"), *flags]) == 0
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    capsys.readouterr()


def test_what_does_not_fit_is_streamed(
    parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and budget against the memory of the device decide; the plan says so."""
    weights = weight_bytes(parent)
    assert weights == sum(p.numel() * 4 for p in tiny_llama().parameters())
    assert weight_bytes(parent, torch.bfloat16) == weights // 2
    assert device_memory(torch.device("cpu")) > 2**30
    flags = [str(parent), "--plan", "--memory-budget", "16MB", *SMALL]
    for memory, streamed in ((weights + 16_000_000, False), (weights + 15_999_999, True)):
        monkeypatch.setattr(loading, "device_memory", lambda _, memory=memory: memory)
        assert main(flags) == 0
        err = capsys.readouterr().err
        assert ("does not fit into memory" in err) == streamed
        assert ("streamed from disk" in err) == streamed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "taylor"], "method taylor: needs the whole model in memory"),
        (["--method", "mini-llm"], "method mini-llm: needs the whole model"),
        (["--method", "flap"], "method flap: needs the whole model"),
        (["--calibration", "self"], "calibration 'self': needs the whole model"),
    ],
)
def test_what_needs_the_model_is_refused(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    code = main([str(parent), "--stream", "--output", str(tmp_path / "run"), *SMALL, *flags])
    err = capsys.readouterr().err.strip()
    assert code == 2 and message in err and "\n" not in err
    assert not (tmp_path / "run").exists()


def test_a_directory_without_weights_is_refused(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(parent, tmp_path / "model")
    (broken / "model.safetensors").unlink()
    for name in (broken, "nowhere/none"):
        code = main([str(name), "--stream", "--output", str(tmp_path / "run"), *SMALL])
        err = capsys.readouterr().err.strip()
        assert code == 2 and err.startswith("error: ") and "\n" not in err


def test_host_layers_are_not_pruned_from() -> None:
    model = bf.stream_layers(tiny_llama(), device="cpu")
    with pytest.raises(ValueError, match=r"streamed one from open_streamed\(directory\)"):
        bf.prune(model, byte_tokenizer(), output_dir="nowhere")
