"""Which weights stay: every pattern and group against a sort in Python, ties and all."""

from __future__ import annotations

from fractions import Fraction
from typing import get_args

import pytest
import torch

from bonsai_fast.config.choices import CompareWithin
from bonsai_fast.config.weight_pattern import Pattern
from bonsai_fast.layerwise import LinearInputs
from bonsai_fast.methods import WEIGHT_METHODS, Choice, configure, resolve
from bonsai_fast.methods.weights.keep_best import keep_best
from bonsai_fast.testing.reference import keep_best_reference

SHAPES = [
    pytest.param((7, 24), id="small"),
    pytest.param((1, 8), id="one-row"),
    pytest.param((131, 16), id="ragged-outputs"),
    pytest.param((3, 136), id="ragged-inputs"),
]


def groups(shape: tuple[int, int], pattern: Pattern, within: str) -> torch.Tensor:
    rows, columns = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    if pattern.group is not None:
        return rows * shape[1] + columns // pattern.group
    return {
        "layer": torch.zeros(shape, dtype=torch.int64),
        "input": columns,
        "input-128": columns // 128,
        "output": rows,
        "output-128": rows // 128,
    }[within]


@pytest.mark.parametrize("levels", [3, 10**6], ids=["many-ties", "few-ties"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("within", get_args(CompareWithin))
@pytest.mark.parametrize("sparsity", [0.5, 0.3])
def test_unstructured_agrees_with_a_sort(
    sparsity: float, within: CompareWithin, shape: tuple[int, int], levels: int
) -> None:
    scores = torch.randint(levels, shape, generator=torch.Generator().manual_seed(1)).float()
    pattern = Pattern.parse("unstructured", sparsity)
    keep = keep_best(scores, pattern, within)
    expected = keep_best_reference(scores, groups(shape, pattern, within), pattern.num_pruned)
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("levels", [3, 10**6], ids=["many-ties", "few-ties"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:8"])
def test_every_group_keeps_exactly_n(text: str, shape: tuple[int, int], levels: int) -> None:
    scores = torch.randint(levels, shape, generator=torch.Generator().manual_seed(2)).float()
    pattern = Pattern.parse(text)
    keep = keep_best(scores, pattern, "output")
    assert pattern.group is not None and str(pattern) == text
    assert (keep.view(-1, pattern.group).sum(1) == int(text[0])).all()
    expected = keep_best_reference(scores, groups(shape, pattern, ""), pattern.num_pruned)
    assert torch.equal(keep, expected)


def inputs_of(states: torch.Tensor) -> LinearInputs:
    gram = states.T @ states / len(states)
    return LinearInputs(len(states), gram.diagonal().double().sqrt(), gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_wanda_is_its_papers_algorithm(text: str, dtype: torch.dtype) -> None:
    """Algorithm 1 word for word; zeros are exact, and what stays is untouched."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(9, 20, generator=generator).to(dtype)
    states = torch.randn(50, 20, generator=generator) * torch.logspace(-2, 2, 20)
    choice = Choice(Pattern.parse(text), "output", False)
    pruned = WEIGHT_METHODS["wanda"].prune(weight, inputs_of(states), choice)
    metric = weight.float().abs() * states.norm(p=2, dim=0)
    if text == "2:4":
        metric = metric.view(-1, 4)
    order = metric.argsort(dim=1)[:, : metric.shape[1] // 2]
    expected = weight.clone().view(metric.shape).scatter(1, order, 0).view(weight.shape)
    assert pruned.dtype == dtype and torch.equal(pruned, expected)
    # an input that is a hundred times larger keeps its weights: magnitude alone would not see it
    magnitude = WEIGHT_METHODS["magnitude"].prune(weight, None, choice)
    assert int((magnitude == 0).sum()) == int((pruned == 0).sum()) == 90
    assert not torch.equal(pruned == 0, magnitude == 0)


def test_magnitude_compares_all_weights_of_a_layer() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [-5.0, 6.0, -7.0, 8.0]])
    method = WEIGHT_METHODS["magnitude"]
    choice = Choice.of(resolve(configure(method="magnitude")))
    assert method.needs(choice) == "nothing"
    pruned = method.prune(weight, None, choice)
    assert pruned.tolist() == [[0, 0, 0, 0], [-5, 6, -7, 8]]


def test_within_an_input_all_methods_agree() -> None:
    """Table 7: there the input is the same, so that only the weight matters."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(10, 24, generator=generator)
    states = torch.randn(99, 24, generator=generator) * torch.logspace(-1, 1, 24)
    choice = Choice(Pattern.parse("unstructured"), "input", False)
    zeros = [
        method.prune(weight, inputs_of(states), choice) == 0 for method in WEIGHT_METHODS.values()
    ]
    assert torch.equal(zeros[0], zeros[1]) and torch.equal(zeros[0], zeros[2])


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2-4", "half", "2:4:8", ""])
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected unstructured or N:M with 0 < N < M"):
        Pattern.parse(text)


def test_a_pattern_says_its_sparsity() -> None:
    assert Pattern.parse("2:4").sparsity == Pattern.parse("4:8", 0.5).sparsity == Fraction(1, 2)
    assert Pattern.parse("1:3", 0.6667).sparsity == Fraction(2, 3)
    # 0.29 * 100 is less than 29 in binary
    assert Pattern.parse("unstructured", 0.29).num_pruned(100) == 29
    with pytest.raises(ValueError, match=r"pattern 2:4 removes 0.5 of the weights.*got 0.6"):
        Pattern.parse("2:4", 0.6)
