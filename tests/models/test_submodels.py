"""Sampled sub-models: p of every kind goes, the strongest units never, complements flip others."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from bonsai_fast.models.layout import Layout
from bonsai_fast.models.submodels import candidates, complement, pack, sample_submodels, unpack


@cache
def layout(attention="head", sublayers=False):
    config = LlamaConfig(
        hidden_size=36,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=50,
        num_hidden_layers=4,
        vocab_size=11,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return Layout.of(model, attention=attention, sublayers=sublayers)


def all_kept(of=None):
    return torch.ones(len(of or layout()), dtype=torch.bool)


def random_prior(seed=0, of=None):
    return torch.rand(
        len(of or layout()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def removed_of_kind(masks, keep, kind):
    inside = torch.tensor([unit.kind == kind for unit in layout()])
    return (keep & ~masks)[:, inside].sum(dim=1)


def sample(prior=None, keep=None, p=0.05, count=20, seed=0):
    prior = random_prior() if prior is None else prior
    keep = all_kept() if keep is None else keep
    return sample_submodels(layout(), prior, keep, step_sparsity=p, num_submodels=count, seed=seed)


@settings(max_examples=40, deadline=None)
@given(
    p=st.floats(0.01, 0.5),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    gone=st.floats(0, 0.9),
)
def test_every_submodel_removes_the_step_and_nothing_else(p, count, seed, gone):
    keep = torch.rand(len(layout()), generator=torch.Generator().manual_seed(seed)) >= gone
    if not keep.any():
        return
    prior = random_prior(seed)
    masks = sample(prior, keep, p, count, seed)
    pool = candidates(layout(), prior, keep, step_sparsity=p)
    assert masks.shape == (count, len(layout())) and masks.dtype == torch.bool
    assert torch.equal(masks[:, ~pool], keep[~pool].expand(count, -1))  # fixed: kept or gone
    for kind in layout().kinds:
        expected = p * int(removed_of_kind(torch.zeros_like(masks), keep, kind)[0])
        assert (removed_of_kind(masks, keep, kind) - expected).abs().max() < 1.5 + 1e-6


def test_complements_flip_candidates_only():
    masks = sample(p=0.3, count=6)
    pool = candidates(layout(), random_prior(), all_kept(), step_sparsity=0.3)
    assert not (~masks[0::2] & ~masks[1::2]).any()
    for group in layout().groups:
        flipped = (masks[0::2] ^ masks[1::2])[:, group.start : group.stop].sum(dim=1)
        wanted = 0.6 * len(group)
        assert ((flipped >= int(wanted)) & (flipped <= np.ceil(wanted))).all()
    assert torch.equal(complement(complement(masks, pool), pool), masks)
    assert torch.equal(masks[:, ~pool], complement(masks, pool)[:, ~pool])


def test_every_weak_unit_is_scored_even_in_small_groups():
    """Nine heads at p = 0.05 give 0.9 candidates: rounded down, no head would ever be scored."""
    masks = sample(count=200)
    pool = candidates(layout(), random_prior(), all_kept(), step_sparsity=0.05)
    assert torch.equal(~masks.all(dim=0), pool)
    for group in layout().groups:
        assert pool[group.start : group.stop].any()
        removed = (~masks[:, group.start : group.stop]).sum(dim=1).double().mean()
        assert abs(float(removed) - 0.05 * len(group)) < 0.03 * len(group)


def test_the_strongest_are_never_removed_and_the_stronger_less_often():
    prior = torch.arange(1, len(layout()) + 1, dtype=torch.float64) ** 2
    masks = sample(prior, p=0.25, count=400)
    group = next(group for group in layout().groups if group.kind == "channel")
    kept = masks[0::2, group.start : group.stop].double().mean(dim=0)
    assert (kept[25:] == 1).all() and (kept[:25] < 1).all()
    prior[group.start : group.start + 25] = torch.tensor([1.0, 10.0] * 12 + [1.0])
    kept = sample(prior, p=0.25, count=400)[0::2, group.start : group.start + 25].double().mean(0)
    assert kept[1::2].min() > kept[0::2].max()


def test_units_without_any_prior_are_removed_alike():
    group = layout().groups[1]
    prior = random_prior()
    prior[group.start : group.stop] = 0
    removed = (~sample(prior, p=0.5, count=600)[0::2, group.start : group.stop]).double().mean(0)
    assert removed.min() > 0.35 and removed.max() < 0.65


def test_infinite_prior_is_never_removed():
    prior = random_prior()
    prior[:5] = torch.inf
    assert sample(prior, p=0.5)[:, :5].all()


def test_same_seed_same_rows_and_more_rows_keep_the_first():
    """Runs resume and re-target: rows must not depend on how many were asked for."""
    assert torch.equal(sample(count=7), sample(count=20)[:7])
    assert not torch.equal(sample(seed=1), sample(seed=2))
    assert not torch.equal(sample(seed=(0, 1)), sample(seed=(0, 2)))


def test_draws_are_the_same_on_every_machine():
    """Written down once: a change means that ledgers no longer match their seeds."""
    prior = 1.0 + torch.arange(len(layout())) % 7
    masks = sample(prior, p=0.2, count=3, seed=(3, 1))
    assert [np.flatnonzero(~row.numpy())[:8].tolist() for row in masks] == [
        [0, 1, 14, 21, 28, 29, 30, 35],
        [7, 8, 9, 15, 16, 22, 23, 36],
        [1, 14, 21, 22, 29, 30, 36, 42],
    ]


@pytest.mark.parametrize("attention", ["head", "kv-group"])
def test_sublayer_units_take_part(attention):
    of = layout(attention, True)
    masks = sample_submodels(
        of, random_prior(0, of), all_kept(of), step_sparsity=0.25, num_submodels=100, seed=0
    )
    assert not masks.all(dim=0)[torch.tensor([unit.kind == "mlp" for unit in of])].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 0.0}, "step_sparsity"),
        ({"p": 0.6}, "step_sparsity"),
        ({"count": 0}, "num_submodels"),
        ({"prior": -torch.ones(236)}, "prior"),
        ({"prior": torch.full((236,), torch.nan)}, "prior"),
        ({"prior": torch.ones(3)}, "prior"),
        ({"keep": torch.ones(3, dtype=torch.bool)}, "keep mask"),
        ({"keep": torch.zeros(236, dtype=torch.bool)}, "nothing can be removed"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        sample(**change)


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**31))
def test_packing_round_trip(units, rows, seed):
    masks = torch.rand(rows, units, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(masks)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (units + 7) // 8)
    assert torch.equal(unpack(packed, units), masks)


def test_packing_puts_the_first_unit_in_the_lowest_bit():
    assert pack(torch.tensor([True] + [False] * 8 + [True])).tolist() == [1, 2]
    with pytest.raises(ValueError, match="unpack"):
        unpack(torch.zeros(2, dtype=torch.uint8), 17)
    with pytest.raises(TypeError, match="pack"):
        pack(torch.zeros(3))
