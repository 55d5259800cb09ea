"""The command `python -m bonsai_fast.export`: what it prints, and how it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import run_command
from export_cases import save_pruned

from bonsai_fast.export import (
    TOLERANCE,
    Agreement,
    CheckError,
    check_llama_cpp,
    reference_of,
    to_gguf,
)
from bonsai_fast.export import __main__ as command
from bonsai_fast.export.__main__ import COMMAND, ExportOptions, main
from bonsai_fast.export.check import run_engine

run = partial(run_command, main)


def test_last_line_of_stdout_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also for a run, whose model lies in a folder of it."""
    pytest.importorskip("xllamacpp")
    save_pruned(tmp_path / "run" / "model", "llama3")
    code, out, err = run(capsys, tmp_path / "run", "--check", "--precision", "f32")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    path = tmp_path / "run" / "model-f32.gguf"
    assert result["output"] == str(path) and result["size_bytes"] == path.stat().st_size
    assert result["kind"] == "deci" and result["check"]["greedy_equal"] == 48
    assert "llama.cpp (xllamacpp" in err and "48 places" in err and "Traceback" not in err


@pytest.mark.parametrize("format", ["padded", "decilm"])
def test_other_formats(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """padded is checked in a process that knows nothing of ours; vLLM is rarely installed."""
    save_pruned(tmp_path / "model", "llama3")
    code, out, err = run(capsys, tmp_path / "model", "--format", format, "--check")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["format"] == format
    assert result["output"] == str(tmp_path / f"model-{format}")
    if format == "padded":
        assert result["check"]["greedy_equal"] == 48 and "transformers 5" in err
        assert result["check"]["max_logprob_difference"] < 1e-4
    elif importlib.util.find_spec("vllm") is None:
        assert result["check"] is None and "not checked: vLLM is not installed" in err


def test_a_missing_engine_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pruned(tmp_path / "model", "llama3")
    monkeypatch.setattr("bonsai_fast.export.check.is_installed", lambda _: False)
    code, out, err = run(capsys, tmp_path / "model", "--check")
    assert code == 0 and json.loads(out)["check"] is None
    assert "not checked" in err and "pip install xllamacpp" in err


@pytest.mark.parametrize(
    "stderr, code, said",
    [
        ("x\na.cpp:7: GGML_ASSERT(b) failed\nbacktrace", -6, "a.cpp:7: GGML_ASSERT(b) failed (sig"),
        ("(E) ERROR ValueError: no head\nRuntimeError: Engine core initialization failed.", 1,
         "ValueError: no head (exit code 1)"),
        ("", 1, "no message (exit code 1)"),
    ],
)  # fmt: skip
def test_what_a_failed_engine_said(
    stderr: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    with pytest.raises(CheckError) as caught:
        run_engine("the engine", Path("script.py"), {})
    assert f"the engine does not run the export: {said}" in str(caught.value)


def test_a_file_that_llama_cpp_refuses(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    save_pruned(tmp_path / "model", "llama3")
    reference = reference_of(tmp_path / "model")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckError, match=r"does not run the export: .*exit code|signal"):
        check_llama_cpp(tmp_path / "broken.gguf", reference, tolerance=1.0)


def test_a_file_of_another_model(tmp_path: Path) -> None:
    """The comparison can fail."""
    pytest.importorskip("xllamacpp")
    save_pruned(tmp_path / "model", "llama3")
    save_pruned(tmp_path / "other", "llama3", "mlp of layer 1")
    reference = reference_of(tmp_path / "model")
    to_gguf(tmp_path / "other", tmp_path / "other.gguf", precision="f32")
    with pytest.raises(CheckError, match="expected a mean difference of at most"):
        check_llama_cpp(tmp_path / "other.gguf", reference, tolerance=TOLERANCE["f32"])


def test_a_result_that_differs_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*_: Any) -> Agreement:
        raise CheckError("llama.cpp says\nsomething else")

    save_pruned(tmp_path / "model", "llama3")
    monkeypatch.setattr(command, "check", differs)
    code, out, err = run(capsys, tmp_path / "model", "--check")
    assert code == 1 and out == "" and "error: llama.cpp says something else" in err


def test_commands_of_the_documentation_parse() -> None:
    page = Path(__file__).parents[2] / "docs" / "export.md"
    commands = re.findall(r"bonsai-fast export ([^`\n]+)", page.read_text())
    assert len(commands) >= 5
    for command_line in commands:
        given, _ = COMMAND.parse(command_line.split())
        assert given.pop("model") == "RUN"
        assert ExportOptions(**given).format in ("gguf", "padded", "decilm")


BAD = {
    "no such folder": (["nowhere"], "expected a run or a model directory, got nowhere"),
    "unknown format": (["MODEL", "--format", "onnx"], "onnx"),
    "unknown precision": (["MODEL", "--precision", "q4_k_m"], "q4_k_m"),
    "no padding": (["MODEL", "--pad-channels-to", "0"], "pad_channels_to: expected at least 1"),
    "existing output": (["MODEL", "--output", "MODEL/config.json"], "config.json exists"),
    "parent of another format": (
        ["MODEL", "--format", "padded", "--gguf-parent", "none.gguf"],
        "gguf_parent is for --format gguf only, got --format padded",
    ),
    "precision of another format": (
        ["MODEL", "--format", "decilm", "--precision", "f16"],
        "precision is for --format gguf only, got --format decilm",
    ),
    "no parent": (["MODEL", "--gguf-parent", "none.gguf"], "none.gguf is not readable as GGUF"),
    "unwritable": (["MODEL", "--output", "MODEL/config.json/x.gguf"], "could not write"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[name]
    save_pruned(tmp_path / "model", "llama3")
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.replace("MODEL", str(tmp_path / "model")) for argument in arguments]
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert sorted(tmp_path.rglob("*")) == before
