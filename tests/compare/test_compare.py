"""Methods compared: one protocol, one budget, files that say the same, and a chart that is one."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from commands import run_command
from searches import new_search
from tiny import save_tiny_parent, tiny_llama

from bonsai_fast.compare.__main__ import main
from bonsai_fast.compare.comparison import variant
from bonsai_fast.compare.equal_tokens import within_tokens
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.report.chart import Panel, draw

SVG = "{http://www.w3.org/2000/svg}"
FLAGS = ["--num-sequences", "2", "--sequence-length", "32", "--evaluation-tokens", "256"]
FLAGS += ["--recover", "none"]
NAMES = "flap,policy-gradient,mini-llm:paper"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_parent(tmp_path_factory.mktemp("parent"))


compare = partial(run_command, main)


def test_all_cells_and_all_files(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    output = tmp_path / "out"
    arguments = (
        parent, "--methods", NAMES, "--sparsity", "0.2,0.4", "--search-tokens", "4000",
        "--output", output, *FLAGS,
    )  # fmt: skip
    code, out, err = compare(capsys, *arguments)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads((output / "comparison.json").read_text())
    cells = found["cells"]
    assert [(c["method"], c["asked"]) for c in cells] == [
        (name, sparsity) for sparsity in (0.2, 0.4) for name in NAMES.split(",")
    ]
    for cell in cells:
        assert 0.9 * cell["asked"] <= cell["sparsity"] <= cell["asked"]
        assert cell["protocol"]["sha256"] == found["dense"]["sha256"]
        assert cell["perplexity"] > 0 and cell["peak_bytes"] >= 0
        if cell["method"] in ("policy-gradient", "mini-llm:paper"):
            assert 2000 < cell["tokens"] <= 4000
    rows = list(csv.DictReader((output / "comparison.csv").open()))
    assert [float(row["perplexity"]) for row in rows] == [cell["perplexity"] for cell in cells]
    ElementTree.fromstring((output / "comparison.svg").read_text())
    for word in (*NAMES.split(","), "methods compared", "window"):
        assert word in err

    # again: nothing is searched or measured; less: only what is missing
    def refuse(*_: object) -> None:
        raise AssertionError("a finished cell is computed again")

    with monkeypatch.context() as patch:
        patch.setattr("bonsai_fast.compare.comparison.pruned_model", refuse)
        code, again, _ = compare(capsys, *arguments)
    assert code == 0 and again == out
    (output / "flap-0.4" / "cell.json").unlink()
    code, again, _ = compare(capsys, *arguments)
    resumed = json.loads(again.splitlines()[-1])["cells"]
    for before, now in zip(cells, resumed, strict=True):
        same = {name: now[name] for name in ("method", "sparsity", "perplexity", "tokens")}
        assert same == {name: before[name] for name in same}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--methods", "wanda-sp,magic"], "method: expected one of"),
        (["--methods", "wanda-sp:best"], "preset: expected one of"),
        (["--methods", "bonsai:size=3"], "METHOD[:PRESET][:OPTION=VALUE]"),
        (["--methods", "bonsai:seed=3"], "METHOD[:PRESET][:OPTION=VALUE]"),
        (["--methods", "bonsai:rounds=few"], "rounds: expected a whole number, got 'few'"),
        (["--methods", ","], "at least one"),
        (["--sparsity", "0.2,half"], "expected fractions separated by commas"),
        (["--sparsity", "0.2,1.5"], "expected a fraction in (0, 1)"),
        (["--evaluation-tokens", "0"], "expected at least 1"),
        (["--search-tokens", "0"], "expected at least 1"),
        (["--methds", "x"], "--methds"),
    ],
)
def test_bad_requests(
    flags: list[str],
    message: str,
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = compare(capsys, parent, "--output", tmp_path / "out", *FLAGS, *flags)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokens", [1, 5000, 123456])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "policy-gradient"},
        {"method": "policy-gradient", "preset": "paper", "initial": "layerwise-ppl"},
        {"method": "mini-llm"},
        {"method": "bonsai", "preset": "paper", "sparsity": 0.1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_budgets_are_met_from_below(
    options: dict[str, object], tokens: int, tmp_path: Path
) -> None:
    text = torch.randint(2, 258, (3, 32))
    task = new_search(tiny_llama(), tmp_path / "run", input_ids=text, **options).task
    found = within_tokens(task, tokens)
    knob = next(
        n
        for n in ("rounds", "directions", "submodels_per_round")
        if getattr(found.options, n, None) != getattr(task.options, n, None)
    )

    def cost_of(value: int) -> int:
        config = replace(task.config, options=replace(task.options, **{knob: value}))
        return task.method.plan(replace(task, config=config)).tokens

    value = getattr(found.options, knob)
    assert task.method.plan(found).tokens == cost_of(value) <= max(tokens, cost_of(1))
    assert tokens < cost_of(value + 1)


def test_one_shot_methods_keep_their_configuration(tmp_path: Path) -> None:
    for method in ("flap", "random", "bonsai"):
        task = new_search(tiny_llama(), tmp_path / method, method=method).task
        assert within_tokens(task, 10) is task


def test_names_carry_options() -> None:
    assert variant("flap") == {"method": "flap"}
    assert variant("mini-llm:paper:perturbation-scale=0.01") == {
        "method": "mini-llm", "preset": "paper", "perturbation_scale": "0.01",
    }  # fmt: skip
    assert variant("policy-gradient:rounds=3:baseline=antithetic") == {
        "method": "policy-gradient", "rounds": "3", "baseline": "antithetic",
    }  # fmt: skip


def test_what_is_told_is_not_fitted_to_the_budget(parent: Path, tmp_path: Path, capsys) -> None:
    names = "policy-gradient:rounds=2:submodels-per-round=4,bonsai:rounds=1"
    code, out, err = compare(
        capsys, parent, "--methods", names, "--search-tokens", 100, "--output", tmp_path / "out",
        *FLAGS,
    )  # fmt: skip
    assert code == 0, err
    cells = json.loads(out.splitlines()[-1])["cells"]
    assert cells[0]["submodels"] == 8
    config = json.loads((tmp_path / "out" / "bonsai-rounds=1-0.2" / "run.json").read_text())
    assert config["config"]["rounds"] == 1


def test_the_table_marks_what_misses_its_target(parent: Path, tmp_path: Path, capsys) -> None:
    """Widths in steps of 32 are too coarse for so small a model, single channels are not."""
    for round_to, misses in (("32", True), ("1", False)):
        code, out, err = compare(
            capsys, parent, "--methods", "wanda-sp,flap,random", "--sparsity", "0.3,0.45",
            "--round-to", round_to, "--output", tmp_path / round_to, *FLAGS,
        )  # fmt: skip
        assert code == 0, err
        off = [
            abs(cell["asked"] - cell["sparsity"]) > 0.005 * cell["asked"]
            for cell in json.loads(out.splitlines()[-1])["cells"]
        ]
        assert any(off) == misses and err.count("%*") == sum(off)
        assert ("differs from the sparsity by more than 0.5%" in " ".join(err.split())) == misses


def test_chart_places_points_inside_and_skips_what_it_cannot_show() -> None:
    series = {
        "a <b> & c": [(0.5, 100.0), (0.0, 10.0), (0.9, math.inf), (0.7, math.nan)],
        "one": [(0.2, 1000.0)],
        "none": [(0.1, math.inf)],
    }
    panel = Panel("t", "x", "y", series, log_y=True)
    root = ElementTree.fromstring(draw([panel, Panel("u", "x", "y", {"none": []})]))
    lines, dots = root.findall(f".//{SVG}polyline"), root.findall(f".//{SVG}circle")
    assert len(lines) == 1 and len(dots) == 3
    first, last = (tuple(map(float, p.split(","))) for p in lines[0].get("points", "").split())
    assert first[0] < last[0] and first[1] > last[1]  # larger is higher up
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in dots]
    assert all(60 <= x <= 364 and 34 <= y <= 256 for x, y in places)
    # one decade a step: 10, 100 and 1000 lie evenly
    heights = sorted(y for _, y in places)
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    texts = [text.text for text in root.findall(f".//{SVG}text")]
    assert "a <b> & c" in texts and "no finite value" in texts


def test_peak_memory_sees_what_is_gone_again() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8).amax()
    with PeakMemory(torch.device("cpu")) as quiet:
        pass
    if peak.bytes is None or quiet.bytes is None:
        pytest.skip("this system does not tell")
    assert 60 * 2**20 < peak.bytes < 120 * 2**20 and quiet.bytes < 8 * 2**20
