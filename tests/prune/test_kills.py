"""kill -9 in the middle of every method that records something; the same command goes on.

A start kills itself at the moment when a certain file is about to get its name, or has just got it:
no handler runs, nothing is flushed, and the moment is the same every time.
"""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
from forked import start
from safetensors.torch import load_file
from tiny import save_tiny_parent

from bonsai_fast.compare.__main__ import main

pytestmark = pytest.mark.slow
METHODS = "policy-gradient:paper,policy-gradient,mini-llm,layerwise-ppl,flap"
FLAGS = ["--methods", METHODS, "--sparsity", "0.3", "--search-tokens", "6000"]
FLAGS += ["--num-sequences", "4", "--sequence-length", "32", "--evaluation-tokens", "256"]
FLAGS += ["--recover", "none"]
FLAGS += ["--output"]
# in the order in which they are met
MOMENTS = [
    ("policy-gradient-paper-0.3/ledger/000007.safetensors", "before"),
    ("policy-gradient-0.3/ledger/000002.safetensors", "after"),
    ("mini-llm-0.3/ledger/000009.safetensors", "before"),
    ("layerwise-ppl-0.3/priors/parent.safetensors", "before"),
    ("flap-0.3/priors/parent.safetensors", "after"),
]


def die_at(moment: str, when: str) -> None:
    """From here on, this process kills itself when a file of that name appears."""
    replace = os.replace

    def replace_or_die(source: str, target: str) -> None:
        met = str(target).endswith(moment)
        if met and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if met:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die


def record(run: Path) -> dict[str, dict[str, bytes]]:
    """Evaluations, priors and masks by file and tensor; the order of metadata means nothing."""
    return {
        str(path.relative_to(run)): {
            name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()
        }
        for kind in ("ledger", "priors", "masks")
        for path in run.rglob(f"{kind}/*.safetensors")
    }


def results(run: Path) -> list[dict[str, object]]:
    """Everything but what a clock or the operating system says."""
    cells = json.loads((run / "comparison.json").read_text())["cells"]
    return [{n: v for n, v in cell.items() if n not in ("seconds", "peak_bytes")} for cell in cells]


def test_killed_in_every_method_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = save_tiny_parent(tmp_path / "parent")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([str(parent), *FLAGS, str(whole)]) == 0
    expected = record(whole)
    for moment, when in MOMENTS:
        assert moment in expected
        command = ["bonsai_fast.compare", str(parent), *FLAGS, str(broken)]
        code, _, err = start(*command, folder=tmp_path, before=partial(die_at, moment, when)).wait()
        assert code == -signal.SIGKILL, err
        assert (broken / moment).exists() == (when == "after")
        assert not (broken / Path(moment).parts[0] / "cell.json").exists()
    before = record(broken)
    assert len(before) > 20 and before.items() <= expected.items()

    written: list[str] = []
    replace = os.replace

    def note(source: str, target: str) -> None:
        written.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    assert main([str(parent), *FLAGS, str(broken)]) == 0
    assert record(broken) == expected
    assert results(broken) == results(whole)
    assert not list(broken.rglob("*.tmp"))
    # what was on record was not measured again
    again = {str(Path(path).relative_to(broken)) for path in written}
    assert not again & {name for name in before if "/masks/" not in name}
