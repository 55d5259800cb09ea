"""bench/gpu.py, which nobody here can run on a GPU: all of it at a small size on the CPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


@pytest.fixture
def goals(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_goals")


def small(path: Path, *more: str) -> list[str]:
    return ["--small", "--device", "cpu", "--output", str(path), *more]


def test_everything_runs(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "deep" / "result.json"
    assert gpu.main(small(path)) == 0
    found = json.loads(path.read_text())
    assert found["finished"] and not found["failures"] and not found["out_of_time"]
    assert found["sections"].keys() == gpu.sections(True, None).keys()
    assert all(found["sections"].values()), "no section is empty"
    assert found["machine"]["versions"]["torch"] == torch.__version__
    rows = found["sections"]["scoring"]
    ways = {row["way"] for row in rows if row["layers"] == 2}
    routes = {"dense", "slice", "gather", "auto"}
    of_rounds = {f"round {route}" for route in ("dense", "pack", "tail", "split")}
    assert ways == {"eager", "batched", "cutting", "sliced"} | routes | of_rounds
    assert all(row["seconds"] > 0 for row in rows)
    assert "FAILED" not in capsys.readouterr().out


def test_one_failure_costs_nothing_else(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the section's other cases nor the other sections."""
    from bonsai_fast import ops

    compact = ops.compact_rows

    def broken(source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        if source.dtype == torch.float16:
            raise RuntimeError("no such instruction\nand much more")
        compact(source, index, out)

    monkeypatch.setattr(ops, "compact_rows", broken)
    path = tmp_path / "result.json"
    assert gpu.main(small(path, "--sections", "kernels,copies")) == 1
    found = json.loads(path.read_text())
    assert found["failures"] == {"kernels": "RuntimeError: no such instruction"}
    assert not found["out_of_time"]
    done = {(row["op"], row["dtype"]) for row in found["sections"]["kernels"]}
    assert ("compact", "torch.bfloat16") in done and ("compact", "torch.float16") not in done
    assert found["sections"]["copies"] and found["finished"]


def test_a_wrong_kernel_is_noticed(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bonsai_fast import ops

    glu_mask = ops.glu_mask
    monkeypatch.setattr(ops, "glu_mask", lambda *args, **kwargs: glu_mask(*args, **kwargs) + 0.1)
    path = tmp_path / "result.json"
    assert gpu.main(small(path, "--sections", "kernels")) == 1
    found = json.loads(path.read_text())
    assert "AssertionError" in found["failures"]["kernels"]
    assert "glu_mask" not in {row["op"] for row in found["sections"]["kernels"]}


def test_time_that_runs_out_is_no_failure(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert gpu.main(small(path, "--minutes", "0.001", "--sections", "ratios,scoring")) == 0
    found = json.loads(path.read_text())
    assert found["out_of_time"].keys() == {"ratios", "scoring"} and found["finished"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "kernels,speed"], "expected some of kernels, .*got 'speed'"),
        (["--minutes", "0"], "expected a positive number, got 0"),
        (["--layers", "1"], "expected at least 2, got 1"),
    ],
)
def test_bad_requests_are_refused(
    gpu: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--device", "cpu", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert pytest.raises(ValueError, match=message).matches(ValueError(error))


def test_layers_that_were_not_measured_cost_what_others_do(goals: ModuleType) -> None:
    """The LM head is there once, whatever the depth."""
    head, layer = 5.0, 0.25
    times = {layers: {("auto", 0.3): head + layers * layer} for layers in (4, 8)}
    depths = goals.Depths(8, 32, {4096: times[4]})
    assert depths.of_all(4096, times[8]) == {("auto", 0.3): pytest.approx(head + 32 * layer)}
    assert depths.of_all(128, times[8]) == {}, "nothing to extrapolate from"
    assert goals.Depths(8, 8, {}).of_all(128, times[8]) == times[8]


def test_goals_stand_beside_what_was_reached(
    goals: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from gpu_report import Report

    report = Report(tmp_path / "result.json", 1.0, torch.device("cpu"), {})
    report.begin("scoring", "scoring")
    found = {("batched", None): 3.0, ("auto", 0.3): 2.0, ("auto", 0.05): 2.0}
    found["eager", None] = 12.0
    shape = goals.ModelShape(
        name="x", hidden_size=1, intermediate_size=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=1, vocab_size=1,
    )  # fmt: skip
    goals.compare(report, shape, 4096, goals.Depths(2, 2, {}), found)
    out = capsys.readouterr().out
    assert "1.50x batched, goal 1.6x: NOT met" in out and "1.50x batched, goal 1.25x: met" in out
    assert "6.00x eager, goal 3.4x: met" in out and "extrapolated" not in out
