"""Wanda scores are |W| times the scale; the n best of m stay, the first of equal ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_fast import _C
from bonsai_fast.ops import native

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def case(rows, columns, dtype, seed):
    """Few distinct values, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (rows, columns), generator=generator).to(dtype)
    return weight, torch.randint(0, 3, (columns,), generator=generator).double()


@settings(deadline=None)
@given(
    st.integers(0, 9),
    st.integers(0, 6),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_keep_agrees_with_a_stable_sort(rows, groups, m, share, dtype, seed):
    weight, scale = case(rows, groups * m, dtype, seed)
    n = round(share * m)
    keep = native.wanda_keep(weight, scale, n=n, m=m)
    assert torch.equal(keep, native._keep_torch(weight.float().abs() * scale.float(), n, m))
    assert (keep.view(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [4, 8, 600])
def test_scores_and_strides(dtype, m):
    parameter = torch.nn.Parameter(torch.randn(1200, 600).to(dtype))
    for weight in (parameter, parameter[::3], parameter.T[:, :600]):
        scale = torch.rand(600)
        scores = native.wanda_scores(weight, scale)
        expected = weight.detach().float().abs() * scale
        assert torch.equal(scores, expected)
        keep = native.wanda_keep(weight, scale, n=m // 2, m=m)
        assert torch.equal(keep, native._keep_torch(expected, m // 2, m))
        kept = expected.reshape(-1, m)[keep.view(-1, m)].view(-1, m // 2)
        gone = expected.reshape(-1, m)[~keep.view(-1, m)].view(-1, m // 2)
        assert (kept.amin(1) >= gone.amax(1)).all()


def test_threads_change_nothing():
    weight, scale = torch.randn(700, 512), torch.rand(512).numpy()
    for function, options in ((_C.wanda_scores, {}), (_C.wanda_keep, {"n": 2, "m": 4})):
        runs = [function(weight.numpy(), scale, **options, num_threads=n) for n in (1, 2, 5)]
        assert all(run.tobytes() == runs[0].tobytes() for run in runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3, "m": 2}, "0 <= n <= m"),
        ({"n": -1, "m": 2}, "0 <= n <= m"),
        ({"n": 0, "m": 0}, "0 <= n <= m"),
        ({"n": 2, "m": 4}, "m (must|to) divide"),
    ],
)
def test_rejects_n_of_m(options, message):
    with pytest.raises(ValueError, match=message):
        native.wanda_keep(torch.zeros(2, 6), torch.zeros(6), **options)
    with pytest.raises(ValueError, match=message):
        native._keep_torch(torch.zeros(2, 6), **options)


@pytest.mark.parametrize("m", [4, 20])
@pytest.mark.parametrize("where", ["weight", "scale"])
def test_rejects_scores_without_an_order(m, where):
    weight, scale = torch.ones(3, 20), torch.ones(20)
    (weight[1] if where == "weight" else scale)[7] = torch.nan
    with pytest.raises(ValueError, match="a score is NaN"):
        native.wanda_keep(weight, scale, n=1, m=m)
    with pytest.raises(ValueError, match="a score is NaN"):
        native._keep_torch(weight * scale, 1, m)
    assert native.wanda_scores(weight, scale).isnan().any()


def test_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match=r"got shapes \(2, 6\) and \(5,\)"):
        native.wanda_scores(torch.zeros(2, 6), torch.zeros(5))
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        native.wanda_scores(torch.zeros(2, 6).double(), torch.zeros(6))
    weight = np.zeros((2, 6), np.float32)
    with pytest.raises(TypeError, match="scale must be float32, got float64"):
        _C.wanda_scores(weight, np.zeros(6))
    with pytest.raises(ValueError, match=r"scale must have shape \(6,\), got \(5,\)"):
        _C.wanda_scores(weight, np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="x must be 2-D"):
        _C.wanda_keep(np.zeros(6, np.float32), np.zeros(6, np.float32), n=1, m=2)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    weight, scale = torch.randn(64, 128), torch.rand(128)
    cuda = native.wanda_keep(weight.cuda(), scale.cuda(), n=2, m=4)
    assert torch.equal(cuda.cpu(), native.wanda_keep(weight, scale, n=2, m=4))
    assert torch.equal(native.wanda_scores(weight.cuda(), scale).cpu(), weight.abs() * scale)
