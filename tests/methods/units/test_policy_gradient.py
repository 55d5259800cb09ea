"""The policy gradient against exact enumeration, the projection against a quadratic program."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from searches import new_search
from tiny import tiny_llama

from bonsai_fast.methods import Search, configure
from bonsai_fast.methods.units.policy_gradient.bernoulli import (
    WINDOW,
    BernoulliDescent,
    gradient,
    leave_out,
    project,
    sample,
    score_const,
    sigmoid_budget,
    sigmoid_norm,
)
from bonsai_fast.methods.units.policy_gradient.shares import (
    LOWEST,
    SHARPNESS,
    ShareDescent,
    ranks,
    share_gradient,
)

S = np.array([0.2, 0.5, 0.9, 0.35, 0.7])
ALL = np.array(list(product([False, True], repeat=len(S))))
_RNG = np.random.default_rng(0)
LINEAR, PAIRS = _RNG.normal(size=5), 0.5 * _RNG.normal(size=(5, 5))


def toy(masks: np.ndarray) -> np.ndarray:
    """A loss with interactions, far from zero: what a baseline is for."""
    m = masks.astype(float)
    return 8.0 + m @ LINEAR + np.einsum("si,ij,sj->s", m, PAIRS, m)


def expected_loss(s: np.ndarray) -> float:
    return float(np.where(ALL, s, 1 - s).prod(axis=1) @ toy(ALL))


def exact_gradient(s: np.ndarray) -> np.ndarray:
    steps = 1e-6 * np.eye(len(s))
    return np.array([(expected_loss(s + d) - expected_loss(s - d)) / 2e-6 for d in steps])


def estimates(baseline: str, count: int, repeats: int = 4000) -> np.ndarray:
    """Gradients of many first steps, [repeats, 5]."""
    found = []
    for seed in range(repeats):
        masks = sample(S, count, antithetic=baseline == "antithetic", seed=(seed, 1))
        losses = toy(masks)
        if baseline == "none":
            advantage = losses
        elif baseline == "moving-average":
            advantage = losses - losses.mean() / WINDOW
        else:
            advantage = losses - leave_out(losses, 2 if baseline == "antithetic" else 1)
        found.append(gradient(masks, advantage, S))
    return np.array(found)


def test_every_mask_once_gives_the_exact_gradient() -> None:
    weights = np.where(ALL, S, 1 - S).prod(axis=1)
    found = gradient(ALL, toy(ALL) * weights * len(ALL), S)
    np.testing.assert_allclose(found, exact_gradient(S), rtol=1e-6)


@pytest.mark.parametrize(
    "baseline, count, factor",
    [
        ("none", 2, 1.0),
        # its own losses are in it: the published order of algorithm 1, lines 4 and 5
        ("moving-average", 2, 1 - 1 / (2 * WINDOW)),
        ("leave-one-out", 2, 1.0),
        ("leave-one-out", 16, 1.0),
        ("antithetic", 4, 1.0),
        ("antithetic", 16, 1.0),
    ],
)
def test_the_mean_estimate_is_the_gradient(baseline: str, count: int, factor: float) -> None:
    found = estimates(baseline, count)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    # five coordinates, at 4 standard errors each
    assert (np.abs(found.mean(axis=0) - factor * exact_gradient(S)) <= 4 * error).all()


def cost(baseline: str, count: int) -> float:
    """Variance of the estimate, times the sub-models that it takes."""
    return float(estimates(baseline, count, 2000).var(axis=0).sum()) * count


def test_baselines_lower_the_variance_at_equal_cost() -> None:
    """Many sub-models compared with each other beat two against a moving average."""
    none, average = cost("none", 2), cost("moving-average", 2)
    few, many = cost("leave-one-out", 2), cost("leave-one-out", 16)
    assert many < few < 0.2 * average < none


def test_what_antithetic_pairs_are_good_for() -> None:
    """They cancel what is even around the probabilities, and do nothing for what is odd."""
    half = np.full(5, 0.5)
    masks = sample(half, 16, antithetic=True, seed=0)
    even = 8.0 + np.einsum("si,ij,sj->s", masks - 0.5, PAIRS, masks - 0.5)
    found = gradient(masks, even - leave_out(even, 2), half)
    np.testing.assert_allclose(found, 0.0, atol=1e-12)
    # the loss above is mostly odd
    assert cost("antithetic", 16) > 0.9 * cost("leave-one-out", 16)


def test_antithetic_masks_keep_their_marginals() -> None:
    masks = sample(S, 40000, antithetic=True, seed=3)
    np.testing.assert_allclose(masks.mean(axis=0), S, atol=0.012)
    np.testing.assert_allclose(masks[0::2].mean(axis=0), S, atol=0.017)
    np.testing.assert_allclose(masks[1::2].mean(axis=0), S, atol=0.017)
    correlations = [np.corrcoef(masks[0::2, i], masks[1::2, i])[0, 1] for i in range(len(S))]
    assert max(correlations) < -0.1
    assert sample(S, 7, antithetic=True, seed=3).shape == (7, 5)


def test_what_cannot_vary_has_no_gradient() -> None:
    s = np.array([0.0, 1.0, 0.5])
    masks = sample(s, 64, antithetic=False, seed=0)
    found = gradient(masks, np.ones(64), s)
    assert found[0] == found[1] == 0.0 and np.isfinite(found).all()
    assert not masks[:, 0].any() and masks[:, 1].all()


def test_leave_out_by_hand() -> None:
    losses = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    np.testing.assert_allclose(leave_out(losses, 1), (31 - losses) / 4)
    np.testing.assert_allclose(leave_out(losses, 2)[:2], 28 / 3)
    np.testing.assert_allclose(leave_out(losses, 2)[4], 15 / 4)
    with pytest.raises(ValueError, match="more than 2 sub-models"):
        leave_out(losses[:2], 2)


def nearest(z: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """The quadratic program, solved by trying every set of active bounds."""
    best, least = np.clip(z, 0, 1), np.inf
    if best @ costs <= budget:
        return best
    for where in product(("zero", "one", "free"), repeat=len(z)):
        kinds = np.array(where)
        s, free = (kinds == "one").astype(float), kinds == "free"
        if free.any():
            s[free] = z[free] - (costs[free] @ z[free] + s @ costs - budget) / costs[free].sum()
        inside = s.min() >= 0 and s.max() <= 1 and s @ costs <= budget + 1e-9
        if inside and costs @ (s - z) ** 2 < least:
            best, least = s, costs @ (s - z) ** 2
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("equal", [True, False])
def test_projection_against_a_quadratic_program(seed: int, equal: bool) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(0.5, 0.7, size=6)
    costs = np.ones(6) if equal else rng.uniform(0.2, 5.0, size=6)
    budget = rng.uniform(0.1, 0.9) * costs.sum()
    found = project(z, costs, budget)
    assert found @ costs <= budget and found.min() >= 0 and found.max() <= 1
    np.testing.assert_allclose(found, nearest(z, costs, budget), atol=1e-12)
    np.testing.assert_allclose(project(found, costs, budget), found)


def test_projection_at_the_edges() -> None:
    ones = np.ones(3)
    np.testing.assert_array_equal(project(np.array([2.0, -1.0, 0.5]), ones, 3.0), [1.0, 0.0, 0.5])
    np.testing.assert_array_equal(project(ones, ones, 0.0), 0 * ones)
    np.testing.assert_allclose(project(ones, ones, 1.5), 0.5 * ones)


def test_starts() -> None:
    rng = np.random.default_rng(0)
    metric = rng.lognormal(sigma=2.0, size=40) * np.repeat([1.0, 1000.0], 20)
    groups, costs = np.repeat([0, 1], 20), rng.uniform(1, 5, size=40)
    s = sigmoid_norm(metric, groups)
    for group in (0, 1):
        logits = np.log(s / (1 - s))[groups == group]
        assert abs(logits.mean()) < 1e-9 and abs(logits.std() - 1) < 1e-9
        order = np.argsort(metric[groups == group])
        assert (np.diff(s[groups == group][order]) > 0).all()
    budget = 0.7 * costs.sum()
    met = sigmoid_budget(metric, groups, costs, budget, sharpness=4.0)
    assert met @ costs <= budget and met @ costs == pytest.approx(budget, rel=1e-9)
    assert sigmoid_norm(np.ones(3), np.zeros(3, dtype=int)).tolist() == [0.5, 0.5, 0.5]
    assert score_const(np.array([True, False])).tolist() == [0.8, pytest.approx(0.2)]


@pytest.mark.parametrize(
    "baseline, count", [("moving-average", 2), ("leave-one-out", 8), ("antithetic", 8)]
)
def test_descent_finds_the_best_mask(baseline: str, count: int) -> None:
    costs = np.array([1.0, 2.0, 1.0, 1.0, 2.0])
    budget = 4.0
    allowed = ALL[ALL @ costs <= budget]
    best = allowed[np.argmin(toy(allowed))]
    descent = BernoulliDescent(
        np.full(5, 0.5), costs, count=count, learning_rate=0.01, baseline=baseline, seed=0
    )
    for _ in range(3000 // count):
        masks = descent.masks()
        descent.update(masks, toy(masks), budget)
        assert descent.probabilities @ costs <= budget
    assert ((descent.probabilities > 0.5) == best).all()


def test_overflowing_submodels_do_not_stop_it() -> None:
    descent = BernoulliDescent(
        np.full(5, 0.5), np.ones(5), count=4, learning_rate=0.01, baseline="leave-one-out", seed=0
    )
    masks = descent.masks()
    descent.update(masks, np.array([1.0, np.nan, np.inf, 3.0]), 5.0)
    assert np.isfinite(descent.probabilities).all()
    before = descent.probabilities.copy()
    descent.update(descent.masks(), np.full(4, np.nan), 5.0)
    assert (descent.probabilities == before).all() and descent.step == 2
    with pytest.raises(ValueError, match="expected more than 2 sub-models"):
        BernoulliDescent(S, S, count=2, learning_rate=1.0, baseline="antithetic", seed=0)


RANKS, GROUPS = np.array([0.5, 1.0, 1 / 3, 2 / 3, 1.0]), np.array([0, 0, 1, 1, 1])
COSTS = np.array([3.0, 3.0, 1.0, 1.0, 1.0])


def share_descent(**changes: object) -> ShareDescent:
    options: dict[str, object] = {
        "start": np.zeros(2), "steps": 10, "count": 8, "learning_rate": 0.05,
        "baseline": "leave-one-out", "seed": 0,
    }  # fmt: skip
    options.update(changes)
    budget = options.pop("budget", 6.0)
    return ShareDescent(RANKS, GROUPS, COSTS, budget, **options)  # type: ignore[arg-type]


def test_ranks_by_hand() -> None:
    found = ranks(np.array([5.0, -1.0, 7.0, 7.0, 0.0]), np.array([1, 0, 1, 1, 0]))
    np.testing.assert_allclose(found, [1 / 3, 0.5, 2 / 3, 1.0, 1.0])


def test_gradient_by_shares_is_exact_on_all_masks() -> None:
    shares = np.array([0.6, 0.55])

    def probabilities(t: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-SHARPNESS * (RANKS - t[GROUPS])))

    s = probabilities(shares)
    weights = np.where(ALL, s, 1 - s).prod(axis=1)
    found = share_gradient(ALL, toy(ALL) * weights * len(ALL), s, GROUPS)
    steps = 1e-6 * np.eye(2)
    exact = [
        (expected_loss(probabilities(shares + d)) - expected_loss(probabilities(shares - d))) / 2e-6
        for d in steps
    ]
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_shares_meet_the_budget_and_start_where_they_are_told() -> None:
    descent = share_descent()
    assert descent.probabilities @ COSTS == pytest.approx(6.0, rel=1e-9)
    assert descent.shares[0] == descent.shares[1]
    apart = share_descent(start=np.array([-1.0, 0.0]), budget=8.0)
    assert apart.shares[0] == LOWEST and apart.probabilities[:2].min() > 0.99
    for _ in range(10):
        masks = descent.masks()
        before = descent.shares
        descent.update(masks, toy(masks), 6.0)
        assert descent.probabilities @ COSTS <= 6.0 * (1 + 1e-9)
        change = descent.shares - before
        # a step's size is told, and shrinks; at the ends of the range it may be less
        moved = change - np.array([6, 3]) / 9 @ change
        assert np.sqrt(np.array([6, 3]) / 9 @ moved**2) <= 0.05 * (1.1 - 0.1 * descent.step) + 1e-6


def test_shares_find_which_group_can_spare_more() -> None:
    """The loss counts what goes, ten times as much in one group."""
    descent = share_descent(steps=60)
    for _ in range(60):
        masks = descent.masks()
        descent.update(masks, (~masks) @ np.where(GROUPS == 0, 10.0 * COSTS, COSTS), 6.0)
    gone = (1 - descent.probabilities) * COSTS
    assert gone[GROUPS == 0].sum() < 0.2 * gone.sum()
    assert descent.levels.argmin() == 2  # the lowest rank of the group that can spare


TEXT = torch.randint(2, 258, (5, 32), generator=torch.Generator().manual_seed(0))
VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    "published": {"preset": "paper", "num_sequences": 5},
    "blocks": {"granularity": "blocks"},
    "random": {"initial": "random"},
    "progressive": {"initial": "random-progressive", "granularity": "units"},
    "score-const": {"granularity": "blocks", "projection": "score-const"},
    "layers": {"granularity": "layers", "initial": "layerwise-ppl"},
    "layers from Wanda": {"granularity": "layers"},
    "units from layers": {"granularity": "units", "initial": "layerwise-ppl"},
    "heads": {"attention": "head"},
    "antithetic": {"baseline": "antithetic"},
    "shares, progressive": {"initial": "random-progressive"},
}


def start(path: Path, **options: object) -> Search:
    return new_search(
        tiny_llama(),
        path,
        input_ids=TEXT,
        **{
            "method": "policy-gradient",
            "sparsity": 0.4,
            "rounds": 6,
            "submodels_per_round": 4,
            **options,
        },
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_runs(variant: str, tmp_path: Path) -> None:
    search = start(tmp_path / "run", **VARIANTS[variant])
    keep = search.task.method.find(search)
    layout = search.task.layout
    sparsity = layout.num_removed_parameters(keep) / layout.num_decoder_parameters
    assert 0.92 * 0.4 <= sparsity <= 0.4
    plan = search.task.method.plan(search.task)
    assert (plan.submodels, plan.tokens) == (search.submodels_scored, search.tokens_scored)
    if "layers" in variant and search.task.options.granularity == "layers":
        by_layer = [
            float(keep[[unit.layer == layer for unit in layout]].float().mean())
            for layer in range(4)
        ]
        assert by_layer.count(0.0) == 1 and sum(0 < share < 1 for share in by_layer) <= 2


def test_sublayers_are_refused() -> None:
    with pytest.raises(ValueError, match="choose granularity layers"):
        start(Path("unused"), sublayers=True)


def test_shares_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(ValueError, match="does not support initial layerwise-ppl"):
        start(Path("unused"), initial="layerwise-ppl", granularity="shares")
    with pytest.raises(ValueError, match="expected one of units, blocks, layers, got 'shares'"):
        configure(method="mini-llm", perturbation="gates", granularity="shares")
