"""Relevance from scored sub-models: against truth, against explicit formulas, and on bad rows."""

import numpy as np
import pytest
import torch

from bonsai_fast.methods.regression import Grid, fit_paper, fit_ridge, kendall_tau
from bonsai_fast.methods.regression.restricted_likelihood import held_out_errors, maximise_evidence

SMALL_GRID = Grid(gamma=(0.0, 1e-4), learning_rate=(10, 1, 0.1), batch_size=(32,))


def scored(num_rows=120, num_units=30, noise=0.1, seed=0):
    """Random sub-models of an additive model: masks, utilities, true relevance, prior."""
    rng = np.random.default_rng(seed)
    prior = rng.gamma(2.0, size=num_units)
    truth = prior * rng.gamma(4.0, size=num_units) / 4
    masks = rng.random((num_rows, num_units)) < 0.5
    utility = -3.0 - (~masks) @ truth + noise * rng.normal(size=num_rows)
    return torch.tensor(masks), torch.tensor(utility), torch.tensor(truth), torch.tensor(prior)


def fit(name, masks, utility, **options):
    if name == "paper":
        return fit_paper(masks, utility, grid=SMALL_GRID, **options)
    return fit_ridge(masks, utility, **options)


@pytest.mark.parametrize("name", ["paper", "ridge"])
def test_recovers_an_additive_model(name):
    masks, utility, truth, _ = scored()
    result = fit(name, masks, utility)
    assert np.corrcoef(result.relevance, truth)[0, 1] > 0.98
    assert result.kendall_tau > 0.85 and result.r2 > 0.9
    assert (result.standard_error > 0).all()
    fresh, value, *_ = scored(seed=0, num_rows=200)
    assert kendall_tau(result.predict(fresh).numpy(), value.numpy()) > 0.85


@pytest.mark.parametrize("name", ["paper", "ridge"])
def test_prediction_of_the_parent_is_the_intercept(name):
    masks, _, truth, _ = scored()
    masks[:, 3], masks[:, 4] = True, False
    utility = -3.0 - (~masks).double() @ truth
    result = fit(name, masks, utility)
    parent = torch.ones(1, masks.shape[1], dtype=torch.bool)
    assert float(result.predict(parent)) == pytest.approx(result.intercept)
    assert result.predict(masks).mean() == pytest.approx(float(utility.mean()), abs=0.05)


@pytest.mark.parametrize("name", ["paper", "ridge"])
def test_rows_without_a_finite_utility_are_left_out(name):
    """One sub-model whose perplexity overflows must not poison the others."""
    masks, utility, *_ = scored()
    clean = fit(name, masks[3:], utility[3:])
    utility[:3] = torch.tensor([-torch.inf, torch.nan, torch.inf])
    result = fit(name, masks, utility)
    assert (result.num_dropped, result.num_rows) == (3, 117)
    assert torch.equal(result.relevance, clean.relevance)
    utility[3:-3] = torch.nan
    with pytest.raises(ValueError, match="too few scored sub-models: 3 of 120"):
        fit(name, masks, utility)


@pytest.mark.parametrize("name", ["paper", "ridge"])
def test_scale_and_offset_of_the_utility_do_not_matter(name):
    masks, utility, *_ = scored()
    result, other = fit(name, masks, utility), fit(name, masks, 1000 * utility + 7)
    assert torch.allclose(other.relevance, 1000 * result.relevance, rtol=1e-3, atol=1e-2)
    assert other.kendall_tau == pytest.approx(result.kendall_tau, abs=0.02)


@pytest.mark.parametrize("name", ["paper", "ridge"])
def test_utilities_without_signal_teach_nothing(name):
    masks, *_ = scored(num_rows=80, num_units=200)
    constant = fit(name, masks, torch.zeros(80))
    assert constant.kendall_tau == 0 and constant.r2 == 0
    assert constant.relevance.abs().max() < 1e-6
    noise = torch.randn(80, generator=torch.Generator().manual_seed(0))
    assert abs(fit(name, masks, noise).kendall_tau) < 0.35


def test_paper_keeps_what_was_never_removed():
    masks, utility, *_ = scored()
    masks[:, 0], masks[:, 1] = True, False
    result = fit_paper(masks, utility, grid=SMALL_GRID)
    assert result.relevance[0] == torch.inf and result.relevance[1] == 0
    assert torch.isinf(result.standard_error[:2]).all()
    without = torch.ones(1, masks.shape[1], dtype=torch.bool)
    without[0, 0] = False
    assert result.predict(without) == -torch.inf


def test_paper_is_deterministic_and_its_penalties_differ():
    masks, utility, *_ = scored()
    grid = Grid(gamma=(0.05,), learning_rate=(1,), batch_size=(32,))
    first = fit_paper(masks, utility, grid=grid)
    assert torch.equal(first.relevance, fit_paper(masks, utility, grid=grid).relevance)
    second = fit_paper(masks, utility, grid=grid, penalty="l2")
    assert not torch.equal(first.relevance, second.relevance)
    with pytest.raises(ValueError, match="penalty"):
        fit_paper(masks, utility, penalty="l3")


def test_paper_matches_a_plain_adam():
    """Many grid points at once, centred by a rank-one term, equal one model and torch's Adam."""
    masks, utility, *_ = scored(num_rows=40)
    grid = Grid(gamma=(1e-3,), learning_rate=(0.5,), batch_size=(64,))
    result = fit_paper(masks, utility, grid=grid, epochs=30)
    x = masks.float() - masks.float().mean(dim=0)
    y = ((utility - utility.mean()) / utility.std(correction=0)).float()
    beta = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([beta], lr=1 / (x.shape[1] * 0.5))
    for _ in range(30):
        optimizer.zero_grad()
        loss = (x @ beta - y).square().mean() + 1e-3 * beta.abs().sum()
        loss.backward()
        # torch.abs has derivative 0 at 0, as sign has
        optimizer.step()
    expected = beta.detach().double() * utility.std(correction=0)
    assert torch.allclose(result.relevance, expected, rtol=1e-3, atol=1e-4)


def explicit_posterior(masks, utility, result, rho, deviation, group, noise):
    """The same model with P x P covariances and a nearly flat prior for intercept and scale."""
    z = -(~masks.numpy()).astype(float)
    same = (group[:, None] == group[None]).astype(float)
    values = result.hyperparameters
    covariance = values["unit_variance"] * np.diag(deviation**2)
    covariance += values["group_variance"] * same * np.outer(rho, rho)
    if values["prior_scale"] > 0:
        covariance += 1e6 * np.outer(rho, rho)
    y = utility.numpy()
    total = z @ covariance @ z.T + values["noise_variance"] * np.diag(noise**2) + 1e6
    gain = np.linalg.solve(total, z @ covariance).T
    mean = gain @ (y - y.mean())
    return mean, np.sqrt(np.diag(covariance - gain @ z @ covariance))


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("equal_noise", [True, False], ids=["equal noise", "unequal noise"])
def test_ridge_is_the_posterior(grouped, equal_noise):
    masks, utility, _, prior = scored(num_rows=25, num_units=40, noise=2.0, seed=1)
    masks[:, 0], masks[:, 1] = True, False
    group = torch.arange(40) // 10 if grouped else torch.zeros(40, dtype=torch.int64)
    utility = utility - (~masks).double() @ (group * 0.3 * prior)
    noise = torch.ones(25) if equal_noise else torch.linspace(0.5, 2, 25)
    result = fit_ridge(masks, utility, prior=prior, groups=group if grouped else None, noise=noise)
    total = torch.bincount(group, weights=prior)[group]
    rho = (prior / total).numpy()
    size = torch.bincount(group)[group].numpy()
    deviation = np.maximum(rho, 0.01 / size)
    mean, sd = explicit_posterior(
        masks, utility, result, rho, deviation, group.numpy(), noise.numpy()
    )
    assert result.hyperparameters["prior_scale"] > 0
    np.testing.assert_allclose(result.relevance, mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result.standard_error, sd, rtol=1e-3, atol=1e-4)


def test_prior_and_groups_help():
    """With fewer rows than units, scales of the prior predict where units alone do not."""
    rng = np.random.default_rng(3)
    group = torch.arange(600) // 50
    prior = torch.tensor(rng.gamma(2.0, size=600))
    truth = prior * torch.tensor(rng.gamma(0.5, size=12))[group]
    masks, fresh = (torch.tensor(rng.random((n, 600)) < 0.5) for n in (60, 200))

    def utility(keep):
        return -(~keep).double() @ truth

    def quality(**options):
        result = fit_ridge(masks, utility(masks), **options)
        return kendall_tau(result.predict(fresh).numpy(), utility(fresh).numpy()), result

    plain, with_prior = quality()[0], quality(prior=prior)[0]
    with_groups, result = quality(prior=prior, groups=group)
    assert plain < with_prior < with_groups and with_groups > 0.7
    assert result.kendall_tau == pytest.approx(with_groups, abs=0.15)
    assert torch.corrcoef(torch.stack([result.relevance, truth]))[0, 1] > 0.8


def test_units_that_never_varied_have_prior_mean_and_deviation():
    masks, utility, _, prior = scored()
    masks[:, 5] = True
    result = fit_ridge(masks, utility, prior=prior)
    values = result.hyperparameters
    rho = float(prior[5] / prior.sum())
    assert float(result.relevance[5]) == pytest.approx(values["prior_scale"] * rho)
    assert float(result.standard_error[5]) >= rho * values["unit_variance"] ** 0.5


def test_a_prior_that_points_the_wrong_way_is_ignored():
    masks, utility, truth, _ = scored(num_units=10)
    result = fit_ridge(masks, -utility, prior=truth)
    assert result.hyperparameters["prior_scale"] == 0
    assert (result.relevance[truth > truth.median()] < 0).all()


def test_submodels_that_all_lack_the_same_prior_mass():
    """Complements of equal size say nothing about the prior's scale; that must not blow it up."""
    rng = np.random.default_rng(0)
    masks = torch.ones(40, 20, dtype=torch.bool)
    for row in masks:
        row[rng.permutation(20)[:10]] = False
    utility = -(~masks).double() @ torch.arange(20.0, dtype=torch.float64)
    result = fit_ridge(masks, utility, prior=torch.ones(20))
    assert result.hyperparameters["prior_scale"] == 0 and result.kendall_tau > 0.9
    complements = torch.cat([masks, ~masks])
    result = fit_ridge(complements, torch.cat([utility, -190 - utility]), prior=torch.ones(20))
    assert torch.isfinite(result.relevance).all() and result.kendall_tau > 0.9


@pytest.mark.parametrize("blocks", [np.arange(20), np.arange(20) // 2], ids=["rows", "pairs"])
def test_held_out_errors_equal_refitting(blocks):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(20, 7)), rng.normal(size=20)
    x = np.column_stack([np.ones(20), rng.normal(size=20)])
    kernel = z @ z.T
    model = maximise_evidence(y, x, [kernel])
    v = model.noise * np.eye(20) + model.variances[0] * kernel
    errors = held_out_errors(model.precision, y, blocks)
    for block in np.unique(blocks):
        out = blocks == block
        inverse = np.linalg.inv(v[np.ix_(~out, ~out)])
        b = np.linalg.solve(x[~out].T @ inverse @ x[~out], x[~out].T @ inverse @ y[~out])
        predicted = x[out] @ b + v[np.ix_(out, ~out)] @ inverse @ (y[~out] - x[~out] @ b)
        np.testing.assert_allclose(y[out] - predicted, errors[out], rtol=1e-6, atol=1e-9)


def test_identical_rows_are_held_out_together():
    """Otherwise a copy of a row would predict it, and noise would look like signal."""
    masks, _, _, _ = scored(num_rows=40, num_units=200)
    noise = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    twice = fit_ridge(torch.cat([masks, masks]), torch.cat([noise, noise]))
    naive = fit_ridge(torch.cat([masks, masks]), torch.cat([noise, noise]), blocks=torch.arange(80))
    assert naive.r2 > 0.5 > twice.r2


def test_standard_errors_cover_the_truth():
    inside = []
    for seed in range(8):
        masks, utility, truth, _ = scored(num_rows=60, num_units=40, noise=1.0, seed=seed)
        result = fit_ridge(masks, utility)
        shrunk = (result.relevance - truth).abs() / result.standard_error
        inside.append((shrunk[truth < 3] < 2).double().mean())
    assert np.mean(inside) > 0.8


def test_four_rows_are_enough_to_answer():
    masks, utility, _, prior = scored(num_rows=4)
    for result in (
        fit_ridge(masks, utility, prior=prior, groups=torch.arange(30) // 10),
        fit_paper(masks, utility, grid=SMALL_GRID),
    ):
        assert torch.isfinite(result.relevance).any() and np.isfinite(result.r2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": torch.ones(3)}, "prior: expected shape"),
        ({"prior": -torch.ones(30)}, "prior: expected values >= 0"),
        ({"prior": torch.full((30,), torch.inf)}, "prior: expected finite"),
        ({"groups": torch.ones(3, dtype=torch.int64)}, "groups: expected shape"),
        ({"noise": torch.zeros(120)}, "noise: expected values > 0"),
        ({"blocks": torch.zeros(3)}, "blocks: expected shape"),
    ],
)
def test_bad_options(options, message):
    masks, utility, *_ = scored()
    with pytest.raises(ValueError, match=message):
        fit_ridge(masks, utility, **options)


def test_bad_shapes():
    masks, utility, *_ = scored()
    with pytest.raises(TypeError, match="bool"):
        fit_ridge(masks.float(), utility)
    with pytest.raises(ValueError, match="masks"):
        fit_paper(masks, utility[:-1])


def test_kendall_tau_where_it_is_undefined():
    target = np.arange(4.0)
    assert kendall_tau(target, target) == 1
    assert kendall_tau(np.ones(4), target) == 0
    assert kendall_tau(np.array([0, 1, np.nan, 2]), target) == -1
