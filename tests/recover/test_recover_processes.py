"""The command `recover` in two processes, as `accelerate launch` starts them."""

from __future__ import annotations

import json
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import start
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from transformers import AutoModelForCausalLM

import bonsai_fast as bf
from bonsai_fast.delivery import pruned_model
from bonsai_fast.prune.__main__ import main as prune_main

COMMAND = ("--method", "distill", "--recover-tokens", 1024, "--recover-batch", 2)
COMMAND += ("--num-sequences", 4, "--sequence-length", 32, "--evaluation-tokens", 256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A parent, a pruned model and a text."""
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))
    save_tiny_parent(tmp_path / "parent")
    layout = bf.Layout.of(tiny_llama())
    keep = torch.ones(len(layout), dtype=torch.bool)
    keep[::5] = False
    bf.save_pretrained(bf.remove_units(tiny_llama(), layout, keep), tmp_path / "pruned")
    byte_tokenizer().save_pretrained(tmp_path / "pruned")
    return tmp_path


def joined(rank: int, port: int) -> None:
    """Set what `accelerate launch` sets; no fresh process and no timing, which take longer."""
    pruned_model.verify_saved = lambda *_, **__: 0.0
    pruned_model.SmallerModel.measures_speed = False
    os.environ |= {
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_make_one_model(folder: Path) -> None:
    port, commands = free_port(), []
    words = [folder / "pruned", "--teacher", folder / "parent", "--output", folder / "out"]
    words += ["--calibration", folder / "text.txt", *COMMAND]
    for rank in range(2):
        logs = folder / f"logs-{rank}"
        logs.mkdir()
        before = partial(joined, rank, port)
        commands.append(start("bonsai_fast.recover", *words, folder=logs, before=before))
    (code, out, err), (other, nothing, silence) = (command.wait() for command in commands)
    assert (code, other) == (0, 0), err + silence
    result = json.loads(out.splitlines()[-1])
    trained = result["recovery"]["tiers"][-1]
    assert trained["settings"]["processes"] == 2 and nothing == ""
    assert AutoModelForCausalLM.from_pretrained(folder / "out" / "model") is not None


def test_prune_is_refused_in_several(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prune_main([str(folder / "parent")]) == 2
    assert "prune runs in one process" in capsys.readouterr().err
