"""The search that scores plans as compensated: order, target, interruption, another target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from searches import assert_same_record, found_in_spite_of_stops, new_search
from tiny import tiny_llama
from transformers import PreTrainedModel

from bonsai_fast.methods import Search
from bonsai_fast.methods.importance import surgeon_prior
from bonsai_fast.methods.units import bonsai_compensated
from bonsai_fast.methods.units.bonsai_compensated import CompensatedBonsai
from bonsai_fast.recovery.closed_form.local_refits import LocalRefits
from bonsai_fast.recovery.closed_form.output_grams import OutputGrams

TEXT = torch.randint(2, 258, (12, 32), generator=torch.Generator().manual_seed(0))


def twins(**changes: Any) -> PreTrainedModel:
    """The second half of every MLP's channels computes what the first half does."""
    model = tiny_llama(num_hidden_layers=6, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                weight[64:] = weight[:64]
    return model


def search_in(path: Path, model: PreTrainedModel | None = None, **options: Any) -> Search:
    values: dict[str, Any] = {"sparsity": 0.25, "compensates": True, "input_ids": TEXT, **options}
    return new_search(model or twins(), path, **values)


def find(search: Search) -> torch.Tensor:
    return search.task.method.find(search)


@pytest.fixture
def small_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a twin makes up for nearly all of the other one."""
    monkeypatch.setattr(surgeon_prior, "RIDGE", 1e-4)
    monkeypatch.setattr(bonsai_compensated, "RIDGE", 1e-4)


@pytest.mark.usefixtures("small_ridge")
def test_target_plan_and_twins(tmp_path: Path) -> None:
    """Nothing is lost that a twin can make up for, as scored; and no Gram matrix is left."""
    search = search_in(tmp_path / "run")
    plan = CompensatedBonsai().plan(search.task)
    keep = find(search)
    layout = search.task.layout
    removed = layout.num_removed_parameters(keep)
    assert 0.92 * search.task.budget <= removed <= search.task.budget
    # plans that are equal are scored once
    assert 0.4 * plan.submodels <= search.submodels_scored <= plan.submodels
    assert 0.4 * plan.tokens <= search.tokens_scored <= plan.tokens
    for group in layout.groups:
        kept = keep[group.start : group.stop]
        if group.kind == "channel":
            # a pair that hardly matters may go as a whole; at random, 1 in 10 or more would
            beyond = max(0, int((~kept).sum()) - 64)
            assert int((~kept[:64] & ~kept[64:]).sum()) <= beyond + 6, group.layer
    assert not (tmp_path / "run" / "grams").exists()
    grams = OutputGrams(tmp_path / "grams")
    grams.collect(search.task.model, TEXT)
    refits = LocalRefits(search.task.model, grams, ridge=1e-4, cache_bytes=0)
    masks = torch.stack([torch.ones_like(keep), keep])
    dense, pruned = search.task.scorer.score(masks, TEXT, output_weights=refits).mean(dim=1)
    cut = search.task.scorer.score(keep[None], TEXT).mean()
    assert abs(float(pruned - dense)) < 0.05 * abs(float(cut - dense))


def test_what_is_recorded_is_compensated(tmp_path: Path) -> None:
    search = search_in(tmp_path / "run")
    find(search)
    stages = {entry.stage for entry in search.run.ledger.entries}
    assert stages == {
        f"round-01/{name}" for name in ("attention", "edges", "scale", "widths", "finalists")
    }
    assert all("compensated" in entry.text for entry in search.run.ledger.entries)


def test_without_compensation_nothing_changes(tmp_path: Path) -> None:
    search = search_in(tmp_path / "run", compensates=False)
    find(search)
    assert not any("compensated" in entry.text for entry in search.run.ledger.entries)
    explicit = search_in(tmp_path / "wanda", prior="wanda")
    find(explicit)
    assert not any("compensated" in entry.text for entry in explicit.run.ledger.entries)


def test_interrupted_anywhere_gives_the_same_bits(tmp_path: Path) -> None:
    whole = search_in(tmp_path / "whole")
    keep = find(whole)
    search, again, starts = found_in_spite_of_stops(
        lambda: search_in(tmp_path / "broken"),
        files=3,
        also=("bonsai_fast.recovery.closed_form.output_grams",),
    )
    assert starts > 3
    assert torch.equal(again, keep)
    assert_same_record(whole, search)


def test_another_target_costs_nothing(tmp_path: Path) -> None:
    first = search_in(tmp_path / "run")
    find(first)
    (first.run.path / "model").mkdir(exist_ok=True)
    (first.run.path / "model" / "config.json").write_text("{}")
    first.run.record("finished")
    again = search_in(tmp_path / "run", sparsity=0.4)
    assert again.run.start == "retarget"
    layout = again.task.layout
    removed = layout.num_removed_parameters(find(again)) / layout.num_decoder_parameters
    assert 0.92 * 0.4 <= removed <= 0.4
    assert again.submodels_scored == again.tokens_scored == 0


def test_whole_sublayers_and_heads(tmp_path: Path) -> None:
    for number, options in enumerate(({"sublayers": True}, {"attention": "head"})):
        search = search_in(tmp_path / str(number), sparsity=0.5, **options)
        removed = search.task.layout.num_removed_parameters(find(search))
        assert 0.9 * search.task.budget <= removed <= search.task.budget


@pytest.mark.usefixtures("small_ridge")
def test_prior_obs(tmp_path: Path) -> None:
    """One of two twins is the cheapest to remove; also for methods without compensation."""
    search = search_in(tmp_path / "run", compensates=False)
    everything = torch.ones(len(search.task.layout), dtype=torch.bool)
    prior = search.prior("obs", "parent", everything, TEXT)
    assert bool((prior > 0).all())
    for group in search.task.layout.groups:
        if group.kind == "channel":
            weakest = prior[group.start : group.stop].argsort()[:48] % 64
            assert len(weakest.unique()) >= 46, group.layer
    assert not (tmp_path / "run" / "grams").exists()
    # without a twin, the other one matters
    without = everything.clone()
    block = next(group for group in search.task.layout.groups if group.kind == "channel")
    without[block.start + 64 : block.start + 74] = False
    masked = surgeon_prior.surgeon_prior(
        search.task.model, search.task.layout, without, TEXT, tmp_path / "grams"
    )[block.start : block.start + 64]
    assert float(masked[:10].median()) > 10 * float(masked[10:].median())
