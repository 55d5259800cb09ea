"""An interrupted training is continued to the same bits, and another one is not continued."""

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from forked import call
from safetensors import safe_open
from safetensors.torch import load_file
from training_cases import (
    LENGTH,
    parent,
    tiny_task,
    tiny_text,
    train,
    train_and_save,
    weights_of,
)

from bonsai_fast.recovery.distill import DistillTier
from bonsai_fast.recovery.distill.training_state import STATE

OPTIONS = {"recover_tokens": 30 * LENGTH}


def steps_of(folder: Path) -> int:
    """Steps in the state on the disk; 0 before the first."""
    if not (folder / STATE).exists():
        return 0
    with safe_open(folder / STATE, framework="pt") as file:
        return int(json.loads(file.metadata()["training"])["progress"]["steps"])


def test_a_killed_training_ends_in_the_same_bits(tmp_path):
    whole = tiny_task(tmp_path / "whole", options=OPTIONS)
    expected = train(whole)
    folder = tmp_path / "killed"
    process = call(train_and_save, folder, OPTIONS, {})
    deadline = time.monotonic() + 120
    while steps_of(folder) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    killed_at = steps_of(folder)
    assert 8 <= killed_at < 30 and not (folder / "weights-0.safetensors").exists()
    again = tiny_task(folder, options=OPTIONS)
    record = train(again)
    for name, parameter in again.student.named_parameters():
        assert torch.equal(parameter, whole.student.get_parameter(name)), name
    assert record.curve == expected.curve
    assert record.held_out_before == expected.held_out_before


def test_a_finished_training_is_not_repeated(tmp_path):
    first, second = (tiny_task(tmp_path, options=OPTIONS) for _ in range(2))
    record = train(first)
    changed = (tmp_path / STATE).stat().st_mtime_ns
    again = train(second)
    assert (tmp_path / STATE).stat().st_mtime_ns == changed
    assert again.curve == record.curve and again.seconds >= record.seconds
    for name, parameter in second.student.named_parameters():
        assert torch.equal(parameter, first.student.get_parameter(name)), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"options": {"recover_rate": 0.01}}, "learning_rate=0.001, now it is 0.01"),
        ({"seed": 9}, "seed=5, now it is 9"),
        ({"student": parent()}, "model="),
        ({"text": tiny_text(3, seed=8)}, "text="),
    ],
)
def test_another_training_is_refused(tmp_path, changes, message):
    few = {"recover_tokens": 2 * LENGTH}
    train(tiny_task(tmp_path, options=few))
    options = {**few, **changes.get("options", {})}
    task = tiny_task(tmp_path, **{**changes, "options": options})
    with pytest.raises(ValueError, match=message):
        DistillTier("distill").check(task)


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / STATE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"training-state.safetensors cannot be read: .*delete it"):
        DistillTier("distill").check(tiny_task(tmp_path))


def test_two_processes_train_what_one_does(tmp_path):
    """Half of every batch each, over gloo."""
    options = {"recover_tokens": 32 * LENGTH, "recover_batch": 4, "recover_teacher": "cached"}
    one = tiny_task(tmp_path / "one", options=options)
    record = train(one)
    folder = tmp_path / "two"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["ACCELERATE_USE_CPU"] = "true"
    processes = [
        call(
            train_and_save,
            folder,
            options,
            {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    first, second = (load_file(folder / f"weights-{rank}.safetensors") for rank in range(2))
    start = weights_of(tiny_task(tmp_path / "start").student)
    for name, parameter in weights_of(one.student).items():
        assert torch.equal(first[name], second[name]), name
        moved = float((parameter - start[name]).abs().max())
        assert float((parameter - first[name]).abs().max()) <= 0.01 * moved + 1e-7, name
    assert record.settings["optimiser_steps"] == 8


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
