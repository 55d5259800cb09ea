"""Every command and program of README.md is run, with a tiny model under the real one's name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_parent

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
# a tiny model needs no more
SMALL = "--num-sequences 2 --sequence-length 32 --evaluation-tokens 256"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: a tiny model is there under the name of the README's model."""
    where = tmp_path_factory.mktemp("reader")
    save_tiny_parent(where / MODEL)
    return where


def run(arguments: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(arguments, cwd=where, env=environment, capture_output=True, text=True)


def test_there_is_something_to_run() -> None:
    assert len(COMMANDS) >= 9 and len(PROGRAMS) >= 2
    assert f"bonsai-fast prune {MODEL} --sparsity 0.2 --output runs/mine" in COMMANDS


@pytest.mark.slow
def test_commands_and_programs_in_the_order_of_the_page(folder: Path) -> None:
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            # the demo and the benches take too long here
            done = run(["make", "--dry-run", *words[1:]], ROOT)
        elif words[:2] == ["pip", "install"]:
            # the build itself is in test_packaging.py
            flags = ["--dry-run", "--no-deps", "--no-build-isolation"]
            done = run([sys.executable, "-m", "pip", "install", *flags, *words[2:]], ROOT)
        else:
            assert words[0] == "bonsai-fast"
            flags = SMALL.split() if words[1] == "prune" else []
            script = str(Path(sys.executable).parent / "bonsai-fast")
            done = run([script, *words[1:], *flags], folder)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    small = "bf.PruneConfig(num_sequences=2, sequence_length=32, evaluation_tokens=256, "
    for program in PROGRAMS:
        text = program.replace("bf.PruneConfig(", small)
        done = run([sys.executable, "-c", text], folder)
        assert done.returncode == 0, f"{program}\n{done.stderr}"
    assert (folder / "runs" / "mine" / "model-f16.gguf").is_file()
    assert "The old lighthouse keeper" in (folder / "runs" / "mine" / "report.html").read_text()
    for model in ("mine/model", "sliced", "by-hand", "from-python/model"):
        assert (folder / "runs" / model / "config.json").is_file()


def test_every_folder_of_the_tree_exists() -> None:
    (tree,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    names = [line.split()[0] for line in tree.splitlines()]
    assert len(names) == 8
    assert all((ROOT / name).exists() for name in names), names


def test_every_make_target_that_is_named_exists() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = {word for match in re.findall(r"`make ([a-z -]+)`", text) for word in match.split()}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "lint", "bench-smoke"} <= named <= targets


def test_every_file_that_is_named_exists() -> None:
    """Paths in CONTRIBUTING are from the package or from the root."""
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`([a-z_]+/[a-z_./]*)`", text)
    assert len(paths) >= 20
    missing = [p for p in paths if not ((ROOT / p).exists() or (ROOT / "bonsai_fast" / p).exists())]
    written = [p for p in missing if not p.startswith("runs/")]
    assert not written
