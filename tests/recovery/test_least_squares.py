"""The closed form against a naive float64 least squares."""

import pytest
import torch

from bonsai_fast.layerwise import UnusableInputsError
from bonsai_fast.recovery.closed_form import least_squares
from bonsai_fast.recovery.closed_form.least_squares import WeightedSums, best_correction
from bonsai_fast.recovery.closed_form.symmetric_product import add_symmetric_product, mirror


def naive(
    inputs: torch.Tensor, residual: torch.Tensor, weights: torch.Tensor, ridge: float, bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacked rows: the weighted tokens, and one row for each weight that is held back."""
    x, r, w = inputs.double(), residual.double(), weights.double()
    share = w / w.sum()
    mean_x = share @ x if bias else torch.zeros(x.shape[1], dtype=torch.float64)
    mean_r = share @ r if bias else torch.zeros(r.shape[1], dtype=torch.float64)
    rows = (x - mean_x) * share.sqrt()[:, None]
    held = (ridge * rows.square().sum() / x.shape[1]).sqrt() * torch.eye(
        x.shape[1], dtype=torch.float64
    )
    wanted = torch.cat(
        [(r - mean_r) * share.sqrt()[:, None], torch.zeros(x.shape[1], r.shape[1])]
    ).double()
    change = torch.linalg.lstsq(torch.cat([rows, held]), wanted, driver="gelsd").solution.T
    return change, mean_r - change @ mean_x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("size", [(61, 7, 5), (300, 33, 1), (40, 1, 9)])
def test_correction(
    bias: bool, ridge: float, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "BLOCK_TOKENS", 32)
    monkeypatch.setattr(least_squares, "BLOCK_ROWS", 5)
    tokens, num_inputs, num_outputs = size
    generator = torch.Generator().manual_seed(tokens)
    x = 0.5 + torch.randn(tokens, num_inputs, generator=generator)
    r = 0.2 + torch.randn(tokens, num_outputs, generator=generator)
    w = torch.rand(tokens, generator=generator) + 0.01
    sums = WeightedSums(num_inputs, num_outputs, x.device, with_bias=bias)
    for part in torch.arange(tokens).split(50):
        sums.add(x[part], r[part], w[part])
    equations = sums.normal_equations()
    found = equations.solve(ridge)
    assert found is not None
    weight, offset = naive(x, r, w, ridge, bias)
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, offset, rtol=1e-4, atol=1e-5)
    # the error, here and on other text, against all tokens one by one
    others = WeightedSums(num_inputs, num_outputs, x.device, with_bias=bias)
    others.add(2 * x[:20] - 0.3, r[:20] + 0.5, w[:20])
    for known, (a, b, c) in (
        (equations, (x, r, w)),
        (others.normal_equations(), (2 * x[:20] - 0.3, r[:20] + 0.5, w[:20])),
    ):
        left = (a.double() @ found.weight.T + found.bias - b).square().sum(dim=1)
        share = c.double() / c.double().sum()
        assert known.error(found) == pytest.approx(float(share @ left), rel=1e-4)
        assert known.error(None) == pytest.approx(float(share @ b.double().square().sum(dim=1)))
    assert sums.mean_weight == pytest.approx(float(w.mean()))


def test_removed_columns_follow_the_surgeons_formula() -> None:
    """W_K += W_R A_RK (A_KK + l I)^-1, as for any target that the whole layer gave."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    keep = torch.rand(12, generator=generator) > 0.4
    sums = WeightedSums(int(keep.sum()), 5, x.device, with_bias=False)
    kept = x[:, keep]
    sums.add(kept, x @ weight.T - kept @ weight[:, keep].T, torch.ones(500))
    gram = (x.T @ x / 500).double()
    damped = gram[keep][:, keep]
    damped = damped + 0.3 * damped.diagonal().mean() * torch.eye(len(damped))
    change = weight.double()[:, ~keep] @ gram[~keep][:, keep] @ damped.inverse()
    found = sums.normal_equations().solve(0.3)
    assert found is not None
    torch.testing.assert_close(found.weight, change, rtol=1e-4, atol=1e-5)


def test_the_ridge_is_chosen_on_other_text() -> None:
    """Little text with noise needs a large ridge; text without signal gets no correction."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(3, 20, generator=generator)

    def sums_of(tokens: int, signal: float) -> WeightedSums:
        x = torch.randn(tokens, 20, generator=generator)
        r = signal * x @ truth.T + 5 * torch.randn(tokens, 3, generator=generator)
        sums = WeightedSums(20, 3, x.device, with_bias=False)
        sums.add(x, r, torch.ones(tokens))
        return sums

    ridges = (0.0, 0.1, 1.0, 10.0)
    others = sums_of(4000, 1.0).normal_equations()
    few = best_correction(sums_of(25, 1.0).normal_equations(), others, ridges)
    many = best_correction(sums_of(4000, 1.0).normal_equations(), others, ridges)
    assert few is not None and many is not None
    assert few.ridge > many.ridge
    noise = sums_of(4000, 0.0).normal_equations()
    assert best_correction(sums_of(25, 0.0).normal_equations(), noise, (0.0, 0.1)) is None


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1000])
def test_symmetric_product(size: int) -> None:
    """Added in two parts, with a look at the whole in between."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(40, size, generator=generator)
    weights = torch.rand(40, 1, generator=generator)
    total = torch.zeros(size, size)
    for part in torch.arange(40).split(25):
        add_symmetric_product(total, x[part] * weights[part], x[part])
        mirror(total)
    torch.testing.assert_close(total, (x * weights).T @ x, rtol=1e-4, atol=1e-4)


def test_a_singular_matrix_and_broken_inputs() -> None:
    """An input that is always zero needs a ridge; NaN is named."""
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    x[:, 1] = 0
    sums = WeightedSums(4, 2, x.device, with_bias=False)
    sums.add(x, torch.ones(50, 2), torch.ones(50))
    assert sums.normal_equations().solve(0.0) is None
    found = sums.normal_equations().solve(0.1)
    assert found is not None and bool((found.weight[:, 1] == 0).all())
    sums.add(x * torch.nan, torch.ones(50, 2), torch.ones(50))
    with pytest.raises(UnusableInputsError, match="NaN"):
        sums.normal_equations()
