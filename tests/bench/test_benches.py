"""Every operation has a bench that checks its answers, and results say what ran, not where."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHES = sorted((ROOT / "bench").glob("bench_*.py"))


def test_every_kernel_has_a_bench() -> None:
    kernels = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    assert kernels and kernels <= {path.stem.removeprefix("bench_") for path in BENCHES}


@pytest.fixture(scope="module")
def smoke_cases() -> str:
    """What `make bench-smoke` runs, a line per case."""
    command = [sys.executable, "-m", "pytest", "bench", "-k", "smoke", "--collect-only", "-q"]
    return subprocess.check_output(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True
    )


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_a_bench_has_a_smoke_case_and_checks_its_answers(path: Path, smoke_cases: str) -> None:
    text = path.read_text()
    assert f"bench/{path.name}::" in smoke_cases, "make bench-smoke does not run it"
    assert "assert" in text or ".check(" in text
    assert "record_traffic" in text or "extra_info" in text


def test_results_name_the_machine_without_its_host(tmp_path: Path) -> None:
    """One bench is timed, on its small case; its JSON and the summary behind it are read."""
    output = tmp_path / "results.json"
    arguments = [
        *("bench/bench_token_nll.py", "bench/bench_layers.py", "-k", "smoke", "-q"),
        *("--benchmark-only", f"--benchmark-json={output}", "-p", "no:cacheprovider"),
    ]
    # what workers of pytest-xdist find in their environment turns timing off
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [Path(sys.executable).parent / "pytest", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times all (a column's cost over multiple of 128)" in done.stdout
    result = json.loads(output.read_text())
    machine = result["machine_info"]
    name = subprocess.check_output([sys.executable, "bench/machine.py"], cwd=ROOT, text=True)
    assert machine["machine_name"] == machine["node"] == name.strip() != platform.node()
    assert {"threads", "versions", "cpu"} <= machine.keys()
    assert "project" not in result["commit_info"]
    groups = {bench["group"]: bench["extra_info"] for bench in result["benchmarks"]}
    traffic = next(info for group, info in groups.items() if group.startswith("token_nll"))
    assert {"bytes", "flops", "percent_of_stream", "percent_of_peak"} <= traffic.keys()
    layers = next(info for group, info in groups.items() if group.startswith("up projections"))
    half, odd = layers["half, multiple of 128"], layers["half, multiple of 1"]
    assert half["width"] == 256 and odd["width"] == 255
    assert half["column_over_multiple_of_128"] == 1
