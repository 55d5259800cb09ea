"""Methods compared before and after recovery, with equal tokens; the tier is a fake."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import run_command
from fake_tier import Scale, install
from tiny import save_tiny_parent

from bonsai_fast.compare.__main__ import main
from bonsai_fast.prune.__main__ import main as prune
from bonsai_fast.report import write_report

compare = partial(run_command, main)


def test_columns_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Scale("compensate"))
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))
    output = tmp_path / "out"
    arguments = (
        save_tiny_parent(tmp_path / "parent"), "--methods", "wanda-sp,flap", "--sparsity", "0.3",
        "--num-sequences", 4, "--sequence-length", 32, "--evaluation-tokens", 256, "--output",
        output, "--calibration", tmp_path / "text.txt",
    )  # fmt: skip
    code, out, err = compare(capsys, *arguments, "--recover", "none")
    assert code == 0 and "recovered" not in err, err
    before = json.loads(out.splitlines()[-1])["cells"]
    assert all(cell["recovered"] is None for cell in before)
    # nothing is searched again
    priors = [path.stat().st_mtime_ns for path in output.rglob("priors/*")]
    code, out, err = compare(capsys, *arguments, "--recover", "compensate")
    assert code == 0, err
    assert priors == [path.stat().st_mtime_ns for path in output.rglob("priors/*")]
    cells = json.loads(out.splitlines()[-1])["cells"]
    for cell, former in zip(cells, before, strict=True):
        assert cell["perplexity"] == former["perplexity"] != cell["recovered"]
        assert cell["recovery_tokens"] == 128 and cell["recovery"] == {"recover": "compensate"}
    words = " ".join(err.split())
    assert "recovered: compensate, 128 tokens for each method" in words
    rows = list(csv.DictReader((output / "comparison.csv").open()))
    assert [float(row["recovered"]) for row in rows] == [cell["recovered"] for cell in cells]
    chart = (output / "comparison.svg").read_text()
    ElementTree.fromstring(chart)
    assert "after recovery" in chart
    assert not list(output.rglob("recovery"))
    page = write_report(output / "flap-0.3").read_text()
    assert f"After compensate it is {cells[1]['recovered']:,.2f}." in page


def test_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Scale("compensate", refuses="no such layer"))
    flags = ("--num-sequences", 2, "--sequence-length", 32, "--output", tmp_path / "out")
    parent = save_tiny_parent(tmp_path / "parent")
    for name, message in (("compensate", "no such layer"), ("distill", "has no distill")):
        code, _, err = compare(capsys, parent, *flags, "--recover", name)
        assert code == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_bonsai_counts_on_compensation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is that of `prune` with the same options, in a directory of its own."""
    install(monkeypatch, Scale("compensate"))
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))
    output = tmp_path / "out"
    common = (
        save_tiny_parent(tmp_path / "parent"), "--sparsity", "0.3", "--num-sequences", 4,
        "--sequence-length", 32, "--evaluation-tokens", 256, "--calibration",
        tmp_path / "text.txt",
    )  # fmt: skip
    planned = {}
    for recover in ("none", "compensate"):
        code, out, err = run_command(prune, capsys, *common, "--plan", "--recover", recover)
        assert code == 0, err
        planned[recover] = json.loads(out.splitlines()[-1])["tokens"]
    assert planned["none"] != planned["compensate"]
    for recover, folder in (("none", "bonsai-0.3"), ("compensate", "bonsai-0.3-compensated")):
        code, out, err = compare(
            capsys, *common, "--methods", "bonsai", "--output", output, "--recover", recover
        )
        assert code == 0, err
        (cell,) = json.loads(out.splitlines()[-1])["cells"]
        assert cell["tokens"] == planned[recover]
        assert (output / folder / "cell.json").is_file()
