"""Which units go: the least relevant ones, as many as fit, and never more than asked."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import (
    all_kept,
    any_layout,
    budget_of,
    layout,
    property_test,
    random_relevance,
    removed_and_budget,
    seeds,
    sparsities,
)

from bonsai_fast.methods.allocation import (
    RemovedCount,
    Target,
    group_costs,
    plan_mask,
    select_units,
)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("sparsity=0.2", Target(sparsity=0.2)),
        ("sparsity = 5e-1", Target(sparsity=0.5)),
        ("params=110M", Target(params=110_000_000)),
        ("params=5B", Target(params=5_000_000_000)),
        ("params=1.1b", Target(params=1_100_000_000)),
        ("params=110_000_000", Target(params=110_000_000)),
    ],
)
def test_targets_are_read(text, target):
    assert Target.parse(text) == target
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.2",
        "size=3",
        "sparsity=",
        "sparsity=1",
        "sparsity=nan",
        "sparsity=20%",
        "sparsity=0.2=3",
        "params=0",
        "params=5X",
        "params=M",
        "params=-5M",
        "params=1e999",
    ],
)
def test_other_targets_are_refused_with_what_is_accepted(text):
    with pytest.raises(ValueError, match=r"sparsity=0.2, or params=COUNT") as error:
        Target.parse(text)
    assert "\n" not in str(error.value)


def test_budgets():
    of = layout()
    assert Target(sparsity=0.5).removal_budget(of) == of.num_decoder_parameters // 2
    size = of.num_model_parameters
    assert Target(params=size - 1000).removal_budget(of) == 1000
    with pytest.raises(ValueError, match="ask for fewer"):
        Target(params=size).removal_budget(of)
    with pytest.raises(ValueError, match="cannot be removed"):
        Target(params=100).removal_budget(of)
    with pytest.raises(ValueError, match="sparsity=None and params=None"):
        Target()


@property_test
@given(of=any_layout, seed=seeds, share=st.floats(0, 1))
def test_the_running_count_equals_a_recount(of, seed, share):
    rng = np.random.default_rng(seed)
    keep = torch.tensor(rng.random(len(of)) >= share * rng.random())
    count = RemovedCount(of, keep)
    assert count.removed == of.num_removed_parameters(keep)
    for unit in rng.permutation(len(of))[:40].tolist():
        before, cost = count.removed, count.cost_of(unit)
        count.remove(unit)
        keep[unit] = False
        assert count.removed == before + cost == of.num_removed_parameters(keep)
        assert count.cost_of(unit) == 0


@property_test
@given(
    of=any_layout,
    seed=seeds,
    sparsity=sparsities,
    order=st.sampled_from(["relevance", "relevance_per_parameter"]),
)
def test_selection_removes_what_fits_and_the_least_relevant(of, seed, sparsity, order):
    relevance = random_relevance(of, seed, negative=True)
    keep = select_units(of, relevance, all_kept(of), budget=budget_of(of, sparsity), order=order)
    removed, budget = removed_and_budget(of, keep, sparsity)
    assert removed <= budget
    for group in of.groups:
        values = relevance[group.start : group.stop]
        kept = keep[group.start : group.stop]
        if kept.any() and not kept.all():
            assert values[~kept].max() <= values[kept].min()
    if of.kinds[-1] == "channel" and any(
        keep[group.start : group.stop].sum() > 1 for group in of.groups if group.kind == "channel"
    ):
        assert budget - removed < of.groups[1].num_parameters


def test_selection_goes_on_from_where_it_is():
    of, relevance = layout(), random_relevance(layout(), 0)
    first = select_units(of, relevance, all_kept(of), budget=budget_of(of, 0.2))
    second = select_units(of, relevance, first, budget=budget_of(of, 0.4))
    assert not (second & ~first).any() and (first & ~second).any()
    with pytest.raises(ValueError, match="removed already"):
        select_units(of, relevance, second, budget=budget_of(of, 0.2))


def test_protected_and_infinite_units_stay():
    of, relevance = layout(), random_relevance(layout(), 0)
    protect = torch.rand(len(of), generator=torch.Generator().manual_seed(0)) < 0.5
    relevance[::5] = torch.inf
    keep = select_units(of, relevance, all_kept(of), budget=budget_of(of, 0.8), protect=protect)
    assert keep[protect].all() and keep[::5].all() and not keep.all()


def test_bad_relevance():
    of = layout()
    for bad, message in ((torch.ones(3), "shape"), (torch.full((len(of),), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=message):
            select_units(of, bad, all_kept(of), budget=budget_of(of, 0.2))
    with pytest.raises(ValueError, match="order"):
        select_units(of, torch.ones(len(of)), all_kept(of), budget=budget_of(of, 0.2), order="x")


def test_plans():
    of, order = layout(), random_relevance(layout(), 1)
    counts = [3, 10] * 3
    keep = plan_mask(of, order, counts)
    for group, count in zip(of.groups, counts, strict=True):
        inside = slice(group.start, group.stop)
        assert int((~keep[inside]).sum()) == count
        assert order[inside][~keep[inside]].max() < order[inside][keep[inside]].min()
    assert group_costs(of).tolist() == [group.num_parameters for group in of.groups]
    for bad in ([1], [7, 0] * 3, [-1, 0] * 3):
        with pytest.raises(ValueError, match="counts"):
            plan_mask(of, order, bad)
