"""column_moments: [T, C] -> sums of squares, magnitudes and values [C]; largest magnitude [C]."""

from __future__ import annotations

import math

import pytest
import torch
from op_paths import both, refusals

from bonsai_fast import ops
from bonsai_fast.testing.cases import KERNEL_DTYPES, random_tensor
from bonsai_fast.testing.reference import column_moments_reference

pytest.importorskip("triton")

from bonsai_fast.kernels.column_moments import ROWS_PER_SPLIT

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

FUNCTIONS = both(ops.column_moments)
SHAPES = [
    pytest.param((ROWS_PER_SPLIT, 256), id="aligned"),
    pytest.param((2 * ROWS_PER_SPLIT + 37, 90), id="ragged"),
    pytest.param((5, 300), id="few-tokens"),
    pytest.param((1, 1), id="one"),
    pytest.param((0, 7), id="no-tokens"),
    pytest.param((7, 0), id="no-channels"),
]


def check(actual, x):
    expected = column_moments_reference(x)
    for part, truth in zip(actual, expected, strict=True):
        assert part.dtype == truth.dtype and part.shape == truth.shape
    squares, magnitudes, values, largest = actual
    torch.testing.assert_close(squares, expected[0], rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(magnitudes, expected[1], rtol=1e-5, atol=0, equal_nan=True)
    # Values cancel: what a sum errs goes with the magnitudes.
    if expected[1].numel():
        scale = float(expected[1].nan_to_num(0, 0).max())
        torch.testing.assert_close(values, expected[2], rtol=0, atol=1e-6 * scale, equal_nan=True)
    assert torch.equal(largest.nan_to_num(-1), expected[3].nan_to_num(-1))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_reference(shape, dtype, function, device):
    x = random_tensor(*shape, dtype=dtype, device=device, scale=3)
    check(function(x), x)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("row", [0, 20, ROWS_PER_SPLIT + 3, -1])
def test_nan_and_infinity_stay_in_their_channel(row, function, device):
    """A maximum that drops NaN, or lanes that mix, would hide or spread it."""
    x = random_tensor(ROWS_PER_SPLIT + 40, 90, device=device)
    x[row, 5], x[row, 88] = math.nan, -math.inf
    moments = function(x)
    check(moments, x)
    assert all(part.isnan().nonzero()[:, 0].tolist() == [5] for part in moments)
    assert moments[3].isinf().nonzero()[:, 0].tolist() == [88]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_many_tokens_lose_nothing(function, device):
    """A float32 sum of so many ones stays exact only in parts: 0.1 would drift."""
    x = torch.full((8 * ROWS_PER_SPLIT, 3), 0.1, device=device)
    squares, magnitudes, values, _ = function(x)
    truth = x[0, 0].double() * len(x)
    for part in (magnitudes, values, squares / x[0, 0].double()):
        torch.testing.assert_close(part, truth.expand(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_takes_strided_rows_and_repeats_itself(function, device):
    values = random_tensor(37, 90, device=device)
    x = torch.full((74, 100), math.nan, device=device)[::2, 3:93].copy_(values)
    check(function(x), values)
    assert all(map(torch.equal, function(x), function(values)))


def test_opcheck(device):
    torch.library.opcheck(ops.column_moments, (random_tensor(9, 90, device=device),))


test_says_what_is_wrong = refusals(
    ops.column_moments,
    {},
    [
        pytest.param({"x": torch.ones(3)}, r"x must be \[T, C\], got \[3\]", id="dims"),
        pytest.param({"x": torch.ones(3, 4).double()}, "float16, .* got torch.float64", id="dtype"),
        pytest.param({"x": torch.ones(3, 4).T}, "contiguous along its last dim", id="layout"),
    ],
)
