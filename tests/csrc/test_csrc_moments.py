"""Moments equal float64 sums to 1e-6, and each other to the bit on every instruction set."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_fast import _C
from bonsai_fast.ops import native

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ISAS = _C.instruction_sets()
SHAPES = [
    pytest.param((64, 128), id="aligned"),
    pytest.param((37, 515), id="ragged"),
    pytest.param((1, 1), id="one"),
    pytest.param((0, 7), id="no-tokens"),
    pytest.param((7, 0), id="no-channels"),
    pytest.param((2500, 3), id="long"),
    pytest.param((67, 4131), id="wide"),
]


def expected_moments(x: torch.Tensor) -> native.ChannelMoments:
    wide = x.double()
    largest = wide.abs().amax(0) if len(x) else wide.new_zeros(x.shape[1])
    return native.ChannelMoments(
        wide.square().sum(0), wide.abs().sum(0), wide.sum(0), largest.float()
    )


def assert_moments(actual: native.ChannelMoments, x: torch.Tensor) -> None:
    expected = expected_moments(x)
    assert [value.dtype for value in actual] == [torch.float64] * 3 + [torch.float32]
    for name in ("sum_of_squares", "sum_abs"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=1e-6, atol=0, equal_nan=True
        )
    # Terms of both signs cancel: the error follows their magnitudes.
    slack = 1e-6 * expected.sum_abs.nan_to_num(posinf=0.0)
    close = (actual.sum - expected.sum).abs() <= slack
    same = (actual.sum == expected.sum) | (actual.sum.isnan() & expected.sum.isnan())
    assert (close | same).all()
    torch.testing.assert_close(actual.max_abs, expected.max_abs, rtol=0, atol=0, equal_nan=True)


def bits_of(x: torch.Tensor) -> np.ndarray:
    return (x if x.dtype == torch.float32 else x.view(torch.uint16)).numpy()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    assert_moments(native.channel_moments(x), x)
    # What CUDA tensors go through, on the CPU.
    assert_moments(native._channel_moments_torch(x), x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_pattern_is_read_right(dtype, isa):
    """Signed zeros, subnormals, infinities and NaNs: one channel a pattern."""
    bits = np.arange(2**16, dtype=np.uint16)[None]
    x = torch.from_numpy(bits).view(DTYPES[dtype])
    for array, moments_of in ((bits, _C.column_moments), (bits.T.copy(), _C.row_moments)):
        found = moments_of(array, dtype=dtype, isa=isa)
        moments = native.ChannelMoments(*map(torch.from_numpy, found))
        assert_moments(moments, x)
        assert torch.equal(moments.sum.isnan(), x[0].isnan())


def test_subnormal_float16_survives_flush_to_zero():
    """Some threads run with subnormals switched off; float16 ones are normal numbers in float32."""
    bits = torch.full((1, 1), 2.0**-24, dtype=torch.float16).view(torch.uint16).numpy()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        for isa in ISAS:
            assert _C.column_moments(bits, dtype="float16", isa=isa)[2].item() == 2.0**-24
    finally:
        torch.set_flush_denormal(False)


def test_squares_beyond_float32_neither_overflow_nor_vanish():
    """Squared in float32, 1e30 is Inf and 1e-30 is 0; one block of many must not hide another."""
    x = torch.ones(200, 5)
    x[70, 0], x[70, 1], x[70, 2] = 1e30, 1e-30, -3e38
    x[:, 3], x[:, 4] = 1e-30, 1e30
    for moments in (native.channel_moments(x), native.channel_moments(x[70:71])):
        assert moments.sum_of_squares.isfinite().all() and (moments.sum_of_squares > 0).all()
    assert_moments(native.channel_moments(x), x)
    assert_moments(native.channel_moments(x[70:71]), x[70:71])


def worst_error(x: torch.Tensor) -> float:
    moments = native.channel_moments(x)
    wide = x.double()
    return max(
        float((moments.sum_of_squares / wide.square().sum(0) - 1).abs().max()),
        float((moments.sum_abs / wide.abs().sum(0) - 1).abs().max()),
    )


def test_the_error_is_bounded_whatever_the_values():
    """Equal values round the same way again and again; sums of 64 in a row err by 4e-6."""
    x = torch.full((640, 300), 1.0) + torch.rand(300, generator=torch.Generator().manual_seed(0))
    assert worst_error(x) < 1e-6
    assert worst_error(1 / x) < 1e-6


@settings(deadline=None)
@given(
    st.integers(0, 140),
    st.integers(0, 140),
    st.integers(0, 5),
    st.sampled_from(list(DTYPES)),
    st.integers(0, 2**32 - 1),
)
def test_rows_may_be_far_apart(tokens, channels, gap, dtype, seed):
    """A row stride taken for the number of channels would read the gap, which is NaN.

    Every instruction set gives the same bits.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(channels, generator=generator).exp()
    padded = torch.full((tokens, channels + gap), math.nan)
    padded[:, :channels] = torch.randn(tokens, channels, generator=generator) * scale
    padded = padded.to(DTYPES[dtype])
    given, x = bits_of(padded)[:, :channels], padded[:, :channels]
    for moments_of, truth in ((_C.column_moments, x), (_C.row_moments, x.T)):
        runs = [moments_of(given, dtype=dtype, isa=isa) for isa in ISAS]
        assert_moments(native.ChannelMoments(*map(torch.from_numpy, runs[0])), truth)
        for run in runs[1:]:
            assert [a.tobytes() for a in run] == [a.tobytes() for a in runs[0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_for_any_number_of_threads(dtype):
    x = torch.randn(1031, 1543, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    for moments_of in (_C.column_moments, _C.row_moments):
        runs = [moments_of(bits_of(x), dtype=dtype, num_threads=n) for n in (1, 2, 3, 16)]
        for run in runs:
            for actual, first in zip(run, runs[0], strict=True):
                assert actual.tobytes() == first.tobytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 20, 39])
def test_non_finite_values_stay_in_their_channel(bad, row):
    """fmax would drop a NaN; a shared accumulator would spread it."""
    x = torch.randn(40, 70)
    x[row, 33] = bad
    moments = native.channel_moments(x)
    assert_moments(moments, x)
    for value in moments:
        assert torch.equal(value.isfinite(), torch.arange(70) != 33)


def test_leading_dims_are_tokens():
    x = torch.randn(3, 5, 7)
    assert_moments(native.channel_moments(x), x.flatten(0, 1))
    assert_moments(native.channel_moments(x.transpose(0, 1)), x.flatten(0, 1))
    assert_moments(native.channel_moments(x.transpose(1, 2)), x.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_column_mean_abs(dtype):
    parameter = torch.nn.Parameter(torch.randn(19, 600).to(dtype))
    for weight in (parameter, parameter.T, parameter[::2, 3:50]):
        actual = native.column_mean_abs(weight)
        expected = weight.detach().double().abs().mean(0)
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_weight_norms(dtype):
    parameter = torch.nn.Parameter(torch.randn(19, 600).to(dtype))
    for weight in (parameter, parameter.T, parameter[::2, 3:50]):
        for dim in (0, 1):
            wide = weight.detach().double()
            for actual, order in zip(native.weight_norms(weight, dim), (1, 2), strict=True):
                expected = torch.linalg.vector_norm(wide, order, dim=dim)
                assert actual.dtype == torch.float64
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"expected \(out, in\) and dim 0 or 1"):
        native.weight_norms(parameter, 2)


FLOATS = np.zeros((4, 6), dtype=np.float32)
UNALIGNED = np.frombuffer(b"x" + FLOATS.tobytes(), np.float32, offset=1).reshape(FLOATS.shape)


@pytest.mark.parametrize("function", [_C.column_moments, _C.row_moments])
@pytest.mark.parametrize(
    "array, options, error, message",
    [
        (FLOATS.astype("float64"), {}, TypeError, "must be stored as float32, got float64"),
        (
            FLOATS.astype("float16"),
            {"dtype": "float16"},
            TypeError,
            "stored as uint16, got float16",
        ),
        (FLOATS, {"dtype": "bfloat16"}, TypeError, "must be stored as uint16, got float32"),
        (FLOATS, {"dtype": "float64"}, ValueError, 'or "bfloat16", got "float64"'),
        (FLOATS[0], {}, ValueError, r"must be 2-D, got shape \(6,\)"),
        (FLOATS[None], {}, ValueError, r"must be 2-D, got shape \(1, 4, 6\)"),
        (FLOATS[:, ::2], {}, ValueError, r"shape \(4, 3\) and strides \(24, 8\)"),
        (FLOATS.T, {}, ValueError, r"shape \(6, 4\) and strides \(4, 24\)"),
        (UNALIGNED, {}, ValueError, "must be aligned"),
        (FLOATS, {"isa": "sse9"}, ValueError, r'isa must be one of "portable".*got "sse9"'),
        (FLOATS, {"num_threads": 0}, ValueError, "num_threads must be at least 1, got 0"),
        ([[1.0]], {}, TypeError, "incompatible function arguments"),
    ],
)
def test_rejects(function, array, options, error, message):
    with pytest.raises(error, match=message):
        function(array, **options)


def test_native_rejects():
    with pytest.raises(
        TypeError, match=r"expected float16, bfloat16 or float32, got torch\.float64"
    ):
        native.channel_moments(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"at least two dimensions, got shape \(2,\)"):
        native.channel_moments(torch.zeros(2))
    with pytest.raises(ValueError, match=r"at least one row, got shape \(0, 2\)"):
        native.column_mean_abs(torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"at least one row, got shape \(2, 2, 2\)"):
        native.column_mean_abs(torch.zeros(2, 2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_cuda_agrees_with_float64(dtype):
    x = torch.randn(3000, 130, device="cuda").to(dtype)
    moments = native.channel_moments(x)
    assert all(value.device == x.device for value in moments)
    assert_moments(native.ChannelMoments(*(value.cpu() for value in moments)), x.cpu())
    torch.testing.assert_close(native.column_mean_abs(x), x.double().abs().mean(0))
