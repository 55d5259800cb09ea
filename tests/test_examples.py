"""The examples run, and say what they promise."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_tiny_parent, tiny_llama

from bonsai_fast.scoring import MaskScorer

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shapley_heads.py"


def test_shapley_values_add_up_and_agree_with_the_definition() -> None:
    """Two layers of three heads: all 720 orders can be gone through by hand."""
    pytest.importorskip("shap")
    spec = importlib.util.spec_from_file_location("shapley_heads", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = tiny_llama(num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
    scorer = MaskScorer(model)
    input_ids = torch.randint(258, (2, 24), generator=torch.Generator().manual_seed(0))
    found = example.shapley_values(scorer, input_ids, permutations=40)
    heads = list(found)
    subsets = np.array(np.meshgrid(*[[False, True]] * len(heads))).reshape(len(heads), -1).T
    keep = np.ones((len(subsets), len(scorer.layout)), dtype=bool)
    keep[:, heads] = subsets
    saved = dict(zip(map(bytes, subsets), -scorer.as_function(input_ids)(keep), strict=True))
    whole = saved[bytes(np.ones(6, bool))] - saved[bytes(np.zeros(6, bool))]
    assert sum(found.values()) == pytest.approx(whole, abs=1e-4)
    exact = np.zeros(len(heads))
    weights = [1 / 6 / n for n in (1, 5, 10, 10, 5, 1)]  # of a subset by its size
    for subset in subsets:
        for place in np.flatnonzero(~subset):
            larger = subset.copy()
            larger[place] = True
            gain = saved[bytes(larger)] - saved[bytes(subset)]
            exact[place] += weights[int(subset.sum())] * gain
    np.testing.assert_allclose(list(found.values()), exact, atol=0.25 * np.abs(exact).max())


def test_the_example_is_a_program(tmp_path: Path) -> None:
    pytest.importorskip("shap")
    save_tiny_parent(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text("Many sub-models ride in one batch. " * 4)
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "model", "--text", "text.txt", "--permutations", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("layer")]
    assert len(lines) == 6 and all(line.endswith("nats per token") for line in lines)
