"""The script that compares estimators of the policy gradient reads a run, and counts right."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from script_loading import load_script
from searches import new_search
from tiny import save_tiny_parent, tiny_llama

from bonsai_fast.methods import METHODS

TEXT = torch.randint(2, 258, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench/gradient_variance.py")


def test_signal_leaves_the_noise_out(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(30, 1, 50))
    found = truth + 3.0 * rng.normal(size=(30, 16, 50))
    length = float((truth**2).sum(axis=2).mean())
    assert script.signal(found) == pytest.approx(length, rel=0.15)
    assert script.noise(found) == pytest.approx(9 * 50, rel=0.05)
    assert float((found**2).sum(axis=2).mean()) > 5 * length


def test_a_step_is_cut_into_smaller_ones(script: ModuleType) -> None:
    """Every sub-model is used once, each with its baseline."""
    masks = np.arange(8)[:, None]
    steps = [(masks, 10.0 * number + np.arange(8.0), np.zeros(1)) for number in range(7)]

    def estimate(drawn: np.ndarray, advantage: np.ndarray, _: np.ndarray) -> np.ndarray:
        return np.concatenate([drawn[:, 0], advantage])

    found = script.estimates(steps, "leave-one-out", 4, estimate)
    assert found.shape == (2, 2, 8)
    assert found[0, :, :4].ravel().tolist() == list(range(8))
    np.testing.assert_allclose(found[..., 4:].sum(axis=2), 0.0)
    # far behind a loss that rises by 10 a step
    late = script.estimates(steps, "moving-average", 2, estimate)[..., 2:]
    average = 0.5
    for number in range(1, 7):
        average += (10.0 * number + 0.5 - average) / 5
    np.testing.assert_allclose(late[-1, 0], [60.0 - average, 61.0 - average])


@pytest.mark.parametrize("granularity", ["shares", "units"])
def test_of_a_run(
    granularity: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = save_tiny_parent(tmp_path / "parent")
    search = new_search(
        tiny_llama(), tmp_path / "run", input_ids=TEXT, method="policy-gradient", sparsity=0.3,
        rounds=8, submodels_per_round=16, granularity=granularity,
    )  # fmt: skip
    METHODS["policy-gradient"].find(search)
    before = search.submodels_scored
    assert script.main([str(tmp_path / "run"), str(parent)]) == 0
    assert search.submodels_scored == before
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    by = {(r["unknowns"], r["baseline"], r["submodels_per_step"]): r for r in rows}
    for unknowns in ("shares", "probabilities"):
        assert by[unknowns, "moving-average", 2]["relative_variance"] == pytest.approx(1.0)
        assert by[unknowns, "none", 2]["relative_variance"] > 1.0
        for count in (2, 4, 8):
            assert by[unknowns, "leave-one-out", count]["relative_variance"] < 1.0


def test_too_short_a_run(script: ModuleType) -> None:
    step = (np.ones((8, 1), dtype=bool), np.ones(8), np.ones(1))
    with pytest.raises(ValueError, match="more than 5 steps of at least 4 sub-models, got 5 of 8"):
        script.compare([step] * 5, None)
