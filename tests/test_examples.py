"""The examples run, and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from script_loading import load_script
from tiny import save_tiny_parent, tiny_llama

from bonsai_fast.models.layout import Layout
from bonsai_fast.runs.mask_files import load_mask
from bonsai_fast.scoring import MaskScorer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_shapley_values_add_up_and_agree_with_the_definition() -> None:
    """Two layers of three heads: all 720 orders can be gone through by hand."""
    pytest.importorskip("shap")
    example = load_script("examples/shapley_heads.py")
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


def run(folder: Path, name: str, *flags: str) -> list[str]:
    """What a program prints about a tiny model of one layer."""
    save_tiny_parent(folder / "model", num_hidden_layers=1)
    (folder / "text.txt").write_text("Many sub-models ride in one batch. " * 4)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "model", "--text", "text.txt", *flags],
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_shapley_heads_is_a_program(tmp_path: Path) -> None:
    pytest.importorskip("shap")
    lines = run(tmp_path, "shapley_heads", "--permutations", "1")
    lines = [line for line in lines if line.startswith("layer")]
    assert len(lines) == 6 and all(line.endswith("nats per token") for line in lines)


def test_layer_widths_is_a_program(tmp_path: Path) -> None:
    lines = run(tmp_path, "layer_widths", "--generations", "1", "--sparsity", "0.3")
    assert len(lines) == 3 and lines[0].startswith("layer  0 kv-group: ")
    assert "nats per token after" in lines[2]
    mask = load_mask(tmp_path / "widths.safetensors")
    assert mask.attention == "kv-group" and 0.5 < float(mask.keep.float().mean()) < 0.8


def test_widths_meet_the_budget_and_take_the_least_important_first() -> None:
    example = load_script("examples/layer_widths.py")
    layout = Layout.of(tiny_llama(num_hidden_layers=2))
    rng = np.random.default_rng(0)
    prior = rng.random(len(layout))
    variables = rng.random((4, 9))
    variables[:, 0] = (1.0, 0.0, 1.0, 1.0)  # the first layer's channels go first
    masks = example.Widths(layout, prior, 0.3).masks(variables)
    assert masks.shape == (9, len(layout))
    costs = layout.num_parameters_per_unit.numpy()
    for mask in masks:
        gone = costs[~mask].sum() - 0.3 * layout.num_decoder_parameters
        assert 0 <= gone < costs.max()
        for group in layout.groups:
            here = slice(group.start, group.stop)
            if mask[here].any() and not mask[here].all():
                assert prior[here][~mask[here]].max() < prior[here][mask[here]].min()
    kept = [masks[0, group.start : group.stop].mean() for group in layout.groups]
    assert kept[1] < min(kept[0], kept[2], kept[3])


def test_the_search_finds_better_widths_than_equal_ones() -> None:
    example = load_script("examples/layer_widths.py")
    scorer = MaskScorer(tiny_llama(num_hidden_layers=2))
    input_ids = torch.randint(258, (2, 24), generator=torch.Generator().manual_seed(0))
    mask, found = example.search(scorer, input_ids, sparsity=0.3, generations=4)
    loss = scorer.as_function(input_ids)
    assert loss(mask)[0] == pytest.approx(found.fun, abs=1e-5)
    first, _ = example.search(scorer, input_ids, sparsity=0.3, generations=0)
    assert found.fun <= loss(first)[0] + 1e-5 and found.nit == 4
    assert found.nfev == 5 and len(found.population) == 2 * len(scorer.layout.groups)
