"""What cannot be delivered is refused before the search: one line, nothing written."""

from __future__ import annotations

import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from zoo import tiny_model

import bonsai_fast as bf
from bonsai_fast.methods import configure
from bonsai_fast.models.layout import Layout
from bonsai_fast.prune import job, result_checks
from bonsai_fast.prune.__main__ import main
from bonsai_fast.prune.job import job_of
from bonsai_fast.recover.__main__ import main as recover_main
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.surgery import remove_units, save_pretrained

SMALL = ["--num-sequences", "2", "--sequence-length", "32", "--evaluation-tokens", "256"]
SMALL += ["--recover", "none", "--sparsity", "0.2"]
run = partial(run_command, main)


@pytest.fixture(autouse=True)
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward pass of the search")

    monkeypatch.setattr(MaskScorer, "session", searched)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_parent(tmp_path_factory.mktemp("parent"))


def request_of(**options: Any) -> Any:
    few = {"num_sequences": 2, "sequence_length": 32, "evaluation_tokens": 256, "recover": "none"}
    return configure(**{"sparsity": 0.2, **few, **options})


def assert_refused(
    capsys: pytest.CaptureFixture[str], output: Path, message: str, *words: object
) -> None:
    """By the plan and by the run, in one line with this message, and nothing is written."""
    for plan in (["--plan"], []):
        code, out, err = run(capsys, *words, *SMALL, "--output", output, *plan)
        assert code == 2 and out == "" and err.count("\n") == 1, err
        assert err.startswith("error: ") and message in err
        assert not output.exists()


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))


@pytest.mark.parametrize("method", ["bonsai", "wanda"])
def test_a_disk_without_room_for_the_model(
    method: str,
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full_disk(monkeypatch)
    message = "the pruned model needs 0.00 GB on the disk of"
    assert_refused(capsys, tmp_path / "run", message, parent, "--method", method)


def test_a_disk_without_room_for_a_recovered_model(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full_disk(monkeypatch)
    monkeypatch.setattr("bonsai_fast.recovery.recover_model.Recovery.check", lambda *_: None)
    words = [parent, "--teacher", parent, "--output", tmp_path / "run", "--method", "compensate"]
    for plan in (["--plan"], []):
        few = ["--num-sequences", 2, "--sequence-length", 32, "--evaluation-tokens", 256]
        code, out, err = run_command(recover_main, capsys, *words, *few, *plan)
        assert code == 2 and out == "" and err.count("\n") == 1, err
        assert "the recovered model needs" in err and not (tmp_path / "run").exists()


def test_layers_that_cannot_become_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    layout = Layout.of(model)
    keep = torch.tensor([unit.layer != 1 or unit.index % 2 == 0 for unit in layout])
    save_pretrained(
        remove_units(model, layout, keep), tmp_path / "uneven", tokenizer=byte_tokenizer()
    )
    message = "uniform: the layers of this model differ already"
    assert_refused(capsys, tmp_path / "run", message, tmp_path / "uneven", "--uniform")


class OwnLlama(LlamaForCausalLM):
    """A class that no other process has."""


def test_a_class_of_its_own() -> None:
    model = tiny_llama()
    model.__class__ = OwnLlama
    with pytest.raises(ValueError, match="OwnLlama"):
        job_of(model, byte_tokenizer(), request_of())


def test_shapes_of_the_result_are_built_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the surgery refuses, it is asked about uneven layers and removed sub-layers."""
    asked = []

    def refuses(model: Any, decoder: Any, kept: Any) -> None:
        asked.append(kept)
        if len(asked) == 2:
            raise ValueError("no such shape")

    monkeypatch.setattr(result_checks, "build_structure", refuses)
    with pytest.raises(ValueError, match="no such shape"):
        job_of(tiny_llama(), byte_tokenizer(), request_of())
    uneven, without = (kept.shapes for kept in asked)
    assert len({shape.channels for shape in uneven}) == len(uneven)
    assert [bool(shape.num_heads) for shape in without] == [False, True, False, True]
    assert [bool(shape.channels) for shape in without] == [True, False, True, False]


class Mute(PreTrainedTokenizerFast):
    """A tokenizer that reads and cannot be written."""

    def save_pretrained(self, *_: Any, **__: Any) -> tuple[str, ...]:
        raise NotImplementedError


@pytest.mark.parametrize("method", ["bonsai", "wanda"])
def test_a_tokenizer_that_cannot_be_saved(method: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Mute
    with pytest.raises(ValueError, match="Mute cannot be saved with the pruned model: it has no"):
        job_of(tiny_llama(), tokenizer, request_of(method=method))


@pytest.mark.parametrize("method", ["bonsai", "wanda"])
def test_a_quantized_model(method: str) -> None:
    model = tiny_llama()
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="the model is quantized: prune it before quantization"):
        job_of(model, byte_tokenizer(), request_of(method=method))


def test_the_plan_names_the_engine_and_what_is_not_offered(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "estimate_seconds", lambda *_: 1.0)
    monkeypatch.setattr(Layout, "refused", {"head": "all heads are normalised together"})
    code, _, err = run(capsys, parent, *SMALL, "--output", tmp_path / "run", "--plan")
    words = " ".join(err.replace("│", " ").split())
    assert code == 0 and "not offered: head all heads are normalised together" in words
    assert "engine fused" in words and "formats transformers, gguf" in words
    assert bf.MaskScorer(tiny_model("gpt_neox")).why_hooks != ""
