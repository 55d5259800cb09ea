"""SparseGPT's sweep: against an inverse for every column, and against least squares."""

from __future__ import annotations

import pytest
import torch

from bonsai_fast.config.choices import CompareWithin
from bonsai_fast.config.weight_pattern import Pattern
from bonsai_fast.layerwise import LinearInputs
from bonsai_fast.methods import WEIGHT_METHODS, Choice, configure, resolve
from bonsai_fast.methods.weights.brain_surgeon import InverseHessian, prune_columns
from bonsai_fast.methods.weights.keep_best import keep_best
from bonsai_fast.testing.reference import keep_best_reference, prune_columns_reference

SHAPES = [
    pytest.param((6, 24), id="one-block"),
    pytest.param((5, 264), id="ragged-blocks"),
    pytest.param((1, 8), id="one-row"),
]


def layer(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs of very different size, also among neighbours."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    mix = torch.eye(shape[1]) + 0.3 * torch.randn(shape[1], shape[1], generator=generator)
    states = torch.randn(4 * shape[1], shape[1], generator=generator) @ mix
    sizes = torch.logspace(-0.5, 0.5, shape[1])[torch.randperm(shape[1], generator=generator)]
    return weight, states * sizes


def gram_of(states: torch.Tensor) -> torch.Tensor:
    return states.T @ states / len(states)


def sparsegpt(
    weight: torch.Tensor, states: torch.Tensor, text: str, within: CompareWithin = "input-128"
) -> torch.Tensor:
    gram = gram_of(states)
    inputs = LinearInputs(len(states), gram.diagonal().double().sqrt(), gram)
    choice = Choice(Pattern.parse(text), within, True)
    return WEIGHT_METHODS["sparsegpt"].prune(weight, inputs, choice)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "1:4"])
def test_agrees_with_an_inverse_for_every_column(text: str, shape: tuple[int, int]) -> None:
    weight, states = layer(shape)
    pattern = Pattern.parse(text)
    step = pattern.group or 128

    def choose(_: int, __: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(costs))[:, None].expand_as(costs)
        group_of = rows if pattern.group else torch.zeros_like(rows)
        return keep_best_reference(costs, group_of, pattern.num_pruned)

    expected = prune_columns_reference(weight, gram_of(states), choose, step=step)
    actual = sparsegpt(weight, states, text)
    assert torch.equal(actual == 0, expected == 0)
    if pattern.group:
        assert ((actual == 0).view(-1, pattern.group).sum(1) == pattern.num_pruned(step)).all()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gone", [1, 5, 130])
def test_first_columns_gone_is_least_squares(gone: int) -> None:
    """With nothing settled in between, the sweep is the exact optimum of the columns that stay."""
    weight, states = layer((4, 144))
    gram = gram_of(states).double()
    keep = torch.arange(144) >= gone
    hessian = InverseHessian(gram.float())
    actual = prune_columns(
        weight, hessian, lambda first, now, _: keep[first : first + now.shape[1]].expand_as(now),
        step=128,
    )  # fmt: skip
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(144)
    lost = weight.double()[:, ~keep] @ damped[~keep][:, keep]
    expected = weight.double()[:, keep] + torch.linalg.solve(damped[keep][:, keep], lost.T).T
    assert not actual[:, :gone].any()
    torch.testing.assert_close(actual[:, gone:].double(), expected, rtol=1e-3, atol=1e-3)


def test_one_weight_costs_what_obs_says() -> None:
    """Hassibi's saliency: the error of zeroing one weight and refitting the rest of its row."""
    weight, states = layer((3, 12))
    gram = gram_of(states).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12)
    costs = InverseHessian(gram.float()).costs(weight)
    for j in range(12):
        others = [k for k in range(12) if k != j]
        moved = torch.linalg.solve(damped[others][:, others], damped[others, j])
        # dw = -w_j at j and w_j * moved elsewhere
        step = torch.zeros(12, dtype=torch.float64)
        step[j], step[others] = -1.0, moved
        error = weight[:, j].double().square() * (step @ damped @ step)
        torch.testing.assert_close(costs[:, j].double(), error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("text", ["unstructured", "4:8", "2:4"])
def test_its_error_is_least_on_correlated_inputs(text: str) -> None:
    weight, states = layer((32, 128), seed=1)
    gram = gram_of(states)
    inputs = LinearInputs(len(states), gram.diagonal().double().sqrt(), gram)

    def error(name: str, update: bool) -> float:
        method = WEIGHT_METHODS[name]
        choice = Choice.of(resolve(configure(method=name, pattern=text, weight_update=update)))
        pruned = method.prune(weight, inputs, choice)
        assert int((pruned == 0).sum()) == 32 * 64
        return float(((pruned - weight) @ states.T).square().sum())

    sparse, wanda, magnitude = (
        error(*case) for case in (("sparsegpt", True), ("wanda", False), ("magnitude", False))
    )
    assert sparse < 0.8 * wanda < 0.8 * magnitude
    # the weights that stay can make up for any choice (table 4)
    assert error("wanda", True) < 0.9 * wanda and error("magnitude", True) < 0.95 * magnitude
    assert sparse < error("sparsegpt", False)


def test_a_choice_made_before_is_kept() -> None:
    """Groups that are no blocks of columns are chosen first; the update then knows them all."""
    weight, states = layer((16, 144))
    hessian = InverseHessian(gram_of(states))
    keep = keep_best(hessian.costs(weight), Pattern.parse("unstructured"), "output")
    assert torch.equal(sparsegpt(weight, states, "unstructured", "output") != 0, keep)


def test_inputs_that_are_always_zero_go_first_and_disturb_nothing() -> None:
    weight, states = layer((8, 16))
    states[:, [3, 9]] = 0
    pruned = sparsegpt(weight, states, "unstructured")
    assert pruned.isfinite().all() and not pruned[:, [3, 9]].any()
    others = [j for j in range(16) if j not in (3, 9)]
    alone = sparsegpt(weight, states, "2:4")
    assert alone.isfinite().all() and int((alone == 0).sum()) == 64
    assert int((pruned[:, others] == 0).sum()) == 64 - 16


def test_fewer_tokens_than_inputs_and_no_numbers() -> None:
    weight, states = layer((4, 32))
    assert sparsegpt(weight, states[:3], "unstructured").isfinite().all()
    states[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        sparsegpt(weight, states, "unstructured")
