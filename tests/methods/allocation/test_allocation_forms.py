"""Heads, widths and uniform layers: inside the budget, near it, and close to what was chosen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import (
    LAYOUTS,
    all_kept,
    any_layout,
    budget_of,
    layout,
    property_test,
    random_relevance,
    seeds,
    sparsities,
)

from bonsai_fast.methods.allocation import (
    Achieved,
    auto_multiple,
    finish,
    make_rectangular,
    make_uniform,
    round_widths,
    select_units,
)


def heads_by_kv(of, keep):
    """For each layer, the number of query heads of every KV head that is left."""
    found = []
    for block, kept in of.keep_by_block(keep):
        if hasattr(block, "kv_of_head"):
            left = [kv for kv, stays in zip(block.kv_of_head, kept.tolist(), strict=True) if stays]
            found.append([left.count(kv) for kv in sorted(set(left))])
    return found


def widths(of, keep):
    return [
        int(keep[group.start : group.stop].sum()) for group in of.groups if group.kind == "channel"
    ]


@property_test
@given(seed=seeds, sparsity=sparsities, sublayers=st.booleans())
def test_rectangular_heads(seed, sparsity, sublayers):
    of = layout("llama", "head", sublayers)
    relevance = random_relevance(of, seed)
    before = select_units(of, relevance, all_kept(of), budget=budget_of(of, sparsity))
    keep = make_rectangular(of, before, relevance)
    for old, new in zip(heads_by_kv(of, before), heads_by_kv(of, keep), strict=True):
        assert len(set(new)) <= 1 and bool(old) == bool(new)
    assert of.num_removed_parameters(keep) <= of.num_removed_parameters(before)
    assert widths(of, keep) == widths(of, before)
    again = make_rectangular(of, keep, relevance)
    assert of.num_removed_parameters(again) <= of.num_removed_parameters(keep)


def test_rectangular_heads_keep_the_most_relevant():
    """One layer loses a KV head whole rather than a head of each: its heads are worth least."""
    of = layout()
    relevance = torch.full((len(of),), 10.0, dtype=torch.float64)
    weak = of.groups[2].start
    relevance[weak : weak + 3] = 1
    keep = all_kept(of)
    keep[[0, weak, weak + 1, weak + 2]] = False
    assert heads_by_kv(of, make_rectangular(of, keep, relevance)) == [[3, 3], [3], [3, 3]]


@pytest.mark.parametrize("key", [("llama", "kv-group", False), ("gpt_neox", "head", False)])
def test_rectangular_is_nothing_to_do_without_shared_heads(key):
    of = layout(*key)
    relevance = random_relevance(of, 0)
    keep = select_units(of, relevance, all_kept(of), budget=budget_of(of, 0.4))
    assert torch.equal(make_rectangular(of, keep, relevance), keep)


@property_test
@given(of=any_layout, seed=seeds, sparsity=sparsities, multiple=st.sampled_from([1, 4, 8, 16]))
def test_round_widths(of, seed, sparsity, multiple):
    relevance = random_relevance(of, seed)
    budget = budget_of(of, sparsity)
    before = select_units(of, relevance, all_kept(of), budget=budget)
    keep = round_widths(of, before, relevance, multiple=multiple, budget=budget)
    assert all(width % multiple == 0 for width in widths(of, keep))
    assert of.num_removed_parameters(keep) <= budget
    for group in of.groups:
        inside = slice(group.start, group.stop)
        if group.kind == "channel":
            values, kept = relevance[inside], keep[inside]
            assert not kept.any() or kept.all() or values[~kept].max() <= values[kept].min()
    costs = [group.num_parameters for group in of.groups if group.kind == "channel"]
    if all(width > multiple for width in widths(of, keep)):
        assert budget - of.num_removed_parameters(keep) < multiple * costs[0]


def test_widths_that_are_no_multiple_may_stay_whole():
    of = layout("odd")
    keep = all_kept(of)
    assert widths(of, round_widths(of, keep, random_relevance(of, 0), multiple=32)) == [1000, 1000]
    keep[of.groups[1].start : of.groups[1].start + 100] = False
    rounded = round_widths(of, keep, random_relevance(of, 0), multiple=32)
    assert all(width == 1000 or width % 32 == 0 for width in widths(of, rounded))
    assert min(widths(of, rounded)) < 1000
    with pytest.raises(ValueError, match="multiple"):
        round_widths(of, keep, random_relevance(of, 0), multiple=0)


@pytest.mark.parametrize(
    ("size", "multiple"), [("smollm2", 32), ("wide", 256), ("odd", 32), ("llama", 1)]
)
def test_auto_multiple(size, multiple):
    assert auto_multiple(layout(size)) == multiple


@property_test
@given(
    key=st.sampled_from([key for key in LAYOUTS if not key[2]]),
    seed=seeds,
    sparsity=sparsities,
    multiple=st.sampled_from([1, 8]),
)
def test_uniform(key, seed, sparsity, multiple):
    of = layout(*key)
    relevance, budget = random_relevance(of, seed), budget_of(of, sparsity)
    before = select_units(of, relevance, all_kept(of), budget=budget)
    try:
        keep = make_uniform(of, before, relevance, budget=budget, multiple=multiple)
    except ValueError as error:
        assert "no uniform form" in str(error)
        return
    achieved = Achieved.of(of, keep, budget)
    assert len(set(achieved.heads)) == len(set(achieved.widths)) == 1
    assert achieved.removed <= budget and achieved.widths[0] % multiple == 0
    assert achieved.heads[0][0] % achieved.heads[0][1] == 0
    assert len({tuple(counts) for counts in heads_by_kv(of, keep)}) == 1


@property_test
@given(
    of=any_layout,
    seed=seeds,
    sparsity=sparsities,
    head_layout=st.sampled_from(["rectangular", "free"]),
    round_to=st.sampled_from([1, 4, "auto"]),
)
def test_finish(of, seed, sparsity, head_layout, round_to):
    relevance, budget = random_relevance(of, seed), budget_of(of, sparsity)
    before = select_units(of, relevance, all_kept(of), budget=budget)
    keep, achieved = finish(
        of, before, relevance, budget, head_layout=head_layout, round_to=round_to
    )
    assert achieved.removed == of.num_removed_parameters(keep) <= achieved.asked
    assert achieved.asked == budget
    assert achieved.num_parameters == of.num_model_parameters - achieved.removed
    if round_to == 4:
        assert all(width % 4 == 0 for width in achieved.widths)
    if head_layout == "rectangular":
        assert all(len(set(counts)) <= 1 for counts in heads_by_kv(of, keep))


@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("attention", ["head", "kv-group"])
def test_a_real_size_ends_within_half_a_percent(attention, sparsity):
    of = layout("smollm2", attention)
    budget = budget_of(of, sparsity)
    for seed in range(2):
        relevance = random_relevance(of, seed)
        before = select_units(of, relevance, all_kept(of), budget=budget)
        keep, achieved = finish(of, before, relevance, budget)
        assert achieved.within_tolerance and achieved.removed <= achieved.asked
        assert all(width % 32 == 0 for width in achieved.widths)
        assert all(len(set(counts)) <= 1 for counts in heads_by_kv(of, keep))
        # rounding costs little of what was chosen
        assert relevance[~keep].sum() < 1.15 * relevance[~before].sum()


def test_finish_exchanges_when_multiples_alone_leave_too_much():
    """256 channels of 2 layers are 3 % of the decoder: only heads against channels come near."""
    of = layout("wide")
    budget = budget_of(of, 0.3)
    relevance = random_relevance(of, 0)
    before = select_units(of, relevance, all_kept(of), budget=budget)
    _, achieved = finish(of, before, relevance, budget)
    rounded = round_widths(
        of,
        make_rectangular(of, before, relevance),
        relevance,
        multiple=256,
        budget=achieved.asked,
    )
    assert achieved.removed > of.num_removed_parameters(rounded)


def test_infinite_relevance_survives_finish():
    of = layout("smollm2")
    budget = budget_of(of, 0.2)
    relevance = random_relevance(of, 0)
    relevance[::3] = torch.inf
    before = select_units(of, relevance, all_kept(of), budget=budget)
    keep, achieved = finish(of, before, relevance, budget)
    assert keep[::3].all() and achieved.removed <= achieved.asked


def test_uniform_finish_fits_a_stock_class():
    of = layout("smollm2")
    budget = budget_of(of, 0.2)
    relevance = random_relevance(of, 0)
    before = select_units(of, relevance, all_kept(of), budget=budget)
    _, achieved = finish(of, before, relevance, budget, uniform=True)
    assert len(set(achieved.heads)) == len(set(achieved.widths)) == 1
    assert 0.92 * achieved.asked < achieved.removed <= achieved.asked
    _, exact = finish(of, before, relevance, budget, uniform=True, round_to=1)
    assert exact.within_tolerance


@pytest.mark.parametrize(
    ("options", "message"),
    [({"head_layout": "square"}, "head_layout"), ({"round_to": 0}, "round_to")],
)
def test_bad_options(options, message):
    of = layout()
    with pytest.raises(ValueError, match=message):
        finish(of, all_kept(of), random_relevance(of, 0), budget_of(of, 0.2), **options)
