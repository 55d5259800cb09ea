"""The script that compares estimators of the policy gradient runs, resumes, and counts right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import save_tiny_parent

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gradient_variance.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradient_variance", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_signal_leaves_the_noise_out(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=50)
    found = truth + 3.0 * rng.normal(size=(400, 50))
    assert script.signal(found) == pytest.approx(truth @ truth, rel=0.1)
    assert np.mean(found[0] ** 2) > 5 * np.mean(truth**2)


def test_estimates_use_every_submodel_once(script: ModuleType) -> None:
    masks = np.arange(2 * 64 * 3).reshape(2, 64, 3)
    losses = np.arange(2.0 * 64).reshape(2, 64)
    seen: list[np.ndarray] = []

    def estimate(drawn: np.ndarray, advantage: np.ndarray) -> np.ndarray:
        seen.append(drawn)
        return np.array([advantage.sum()])

    found = script.estimates("leave-one-out", 16, masks, losses, estimate)
    assert found.shape == (8, 1) and np.allclose(found, 0.0)
    assert sorted(np.concatenate(seen).ravel()) == list(range(2 * 64 * 3))


def test_whole_script(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = save_tiny_parent(tmp_path / "parent")
    arguments = [str(parent), "--num-sequences", "3", "--sequence-length", "32"]
    arguments += ["--batches", "3", "--output", str(tmp_path / "run")]
    assert script.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["baseline"], row["submodels_per_step"]) for row in rows} == set(script.ESTIMATORS)
    by = {(r["unknowns"], r["baseline"], r["submodels_per_step"]): r for r in rows}
    for unknowns in ("shares", "blocks"):
        assert by[unknowns, "moving-average", 2]["relative_variance"] == 1.0
        assert by[unknowns, "none", 2]["relative_variance"] > 1.0
        assert by[unknowns, "leave-one-out", 16]["relative_variance"] < 1.0
    entries = sorted((tmp_path / "run" / "ledger").iterdir())
    assert script.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == rows
    assert sorted((tmp_path / "run" / "ledger").iterdir()) == entries
