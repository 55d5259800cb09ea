"""The script that measures recovery cuts the models that the comparison measured, and resumes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from commands import run_command
from script_loading import load_script
from tiny import save_tiny_parent

from bonsai_fast.compare.__main__ import main

compare = partial(run_command, main)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench/recovery_table.py")


def test_of_a_comparison(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, output = save_tiny_parent(tmp_path / "parent"), tmp_path / "compared"
    read, other = tmp_path / "read.txt", tmp_path / "other.txt"
    read.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(4000)))
    other.write_text("".join(f"{n} plus {n} is {n + n}.\n" for n in range(400)))
    code, out, err = compare(
        capsys, parent, "--methods", "flap", "--sparsity", "0.3", "--num-sequences", 4,
        "--sequence-length", 32, "--evaluation-tokens", 1024, "--output", output,
        "--calibration", read, "--evaluation", other, "--recover", "none",
    )  # fmt: skip
    assert code == 0, err
    cells = {cell["method"]: cell for cell in json.loads(out.splitlines()[-1])["cells"]}
    arguments = [
        str(output), "--model", str(parent), "--calibration", str(read), "--evaluation",
        f"{other},{read}", "--evaluation-tokens", "1024", "--recover-tokens", "256", "--output",
        str(tmp_path / "table"),
    ]  # fmt: skip
    assert script.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    for name, cell in cells.items():
        steps = found["cells"][f"compared-{name}-0.3"]
        assert steps["pruned"][str(other)] == pytest.approx(cell["perplexity"], rel=1e-4)
        assert steps["compensate"]["tokens"] > 0
        assert steps["distill"]["tokens"] == 256
        assert set(steps["distill"]) == {str(other), str(read), "tokens"}
    assert set(found["dense"]) == {str(other), str(read)}
    assert sum(line.startswith("| compared-") for line in lines) == 1
    record = tmp_path / "table" / "compared-flap-0.3.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "known": True}))
    assert script.main(arguments) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["cells"]["compared-flap-0.3"].pop("known")
    assert again == found
