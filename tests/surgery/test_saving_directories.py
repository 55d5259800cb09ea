"""Directories of saved models: what lies there, what is not touched, what a failure leaves."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from full_disk import small_files
from surgery_cases import pruned
from transformers import AutoModelForCausalLM

from bonsai_fast.surgery import save_pretrained


class _Tokenizer:
    """Stands for any tokenizer: only its `save_pretrained` matters here."""

    def save_pretrained(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def test_tokenizer_report_and_leftovers(tmp_path: Path) -> None:
    model = pruned("phi3")
    model.config.quantization_config = {"quant_method": "fp8"}
    model.generation_config.max_length = 17
    report: dict[str, Any] = {"parent": "some/model", "round_to": 32, "layers": [{"heads": [1]}]}
    save_pretrained(model, tmp_path / "a" / "b", tokenizer=_Tokenizer(), report=report)
    directory = tmp_path / "a" / "b"
    assert (directory / "tokenizer.json").is_file()
    written = json.loads((directory / "bonsai_report.json").read_text())
    assert written == {"written_by": "bonsai_fast", **report}
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert json.loads((directory / "generation_config.json").read_text())["max_length"] == 17


def test_directories_that_are_in_use(tmp_path: Path) -> None:
    model = pruned("gemma")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save_pretrained(model, tmp_path / "file")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="no model that bonsai_fast saved"):
            save_pretrained(model, foreign, overwrite=overwrite)
    assert (foreign / "thesis.tex").read_text() == "mine"

    ours = tmp_path / "ours"
    ours.mkdir()  # an empty directory is free
    save_pretrained(model, ours, report={"run": 1})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pretrained(model, ours)
    save_pretrained(model, ours, report={"run": 2}, overwrite=True)
    assert json.loads((ours / "bonsai_report.json").read_text())["run"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"file", "foreign", "ours"}


def test_quantized_models_are_refused(tmp_path: Path) -> None:
    model = pruned("gemma")
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantized"):
        save_pretrained(model, tmp_path / "model")


def test_a_full_disk_leaves_no_debris(tmp_path: Path) -> None:
    model, message = pruned("gemma"), r"could not save the model to .*model: "
    with small_files(), pytest.raises(OSError, match=message) as caught:
        save_pretrained(model, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_an_interrupted_overwrite_keeps_the_old_model(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned("gemma")
    save_pretrained(model, tmp_path / "model", report={"run": 1})

    def stop(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(model, "save_pretrained", stop)
    with pytest.raises(type(error)):
        save_pretrained(model, tmp_path / "model", report={"run": 2}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert json.loads((tmp_path / "model" / "bonsai_report.json").read_text())["run"] == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
