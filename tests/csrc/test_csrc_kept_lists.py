"""kept_lists gives what nonzero gives, row by row, padded to one length."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_fast import _C
from bonsai_fast.ops import native


@settings(deadline=None)
@given(
    st.integers(0, 9),
    st.integers(0, 200),
    st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_agrees_with_nonzero(submodels, units, density, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(submodels, units + 3, generator=generator)[:, 3:] < density
    lists, counts = native.kept_lists(masks, multiple=multiple)
    assert lists.dtype == counts.dtype == torch.int32
    assert torch.equal(counts.long(), masks.sum(1))
    longest = int(masks.sum(1).max()) if submodels else 0
    assert lists.shape == (submodels, -(-longest // multiple) * multiple)
    for row, mask, count in zip(lists, masks, counts.tolist(), strict=True):
        assert row[:count].tolist() == mask.nonzero().flatten().tolist()
        assert not row[count:].any()


def test_rows_may_be_far_apart_and_threads_change_nothing():
    base = np.random.default_rng(0).random((64, 20_000)) < 0.6
    view = base[::2, 7:15_007]
    runs = [_C.kept_lists(view, multiple=16, num_threads=n) for n in (1, 2, 5)]
    for lists, counts in runs:
        assert lists.tobytes() == runs[0][0].tobytes()
        assert counts.tolist() == view.sum(1).tolist()


@pytest.mark.parametrize(
    ("keep", "options", "error", "message"),
    [
        (np.zeros((2, 3), np.uint8), {}, TypeError, "keep must be bool, got uint8"),
        (np.zeros(3, bool), {}, ValueError, r"2-D, got shape \(3,\)"),
        (np.zeros((3, 4), bool).T, {}, ValueError, "next to each other"),
        (np.zeros((2, 3), bool), {"multiple": 0}, ValueError, "at least 1, got 0"),
        (np.zeros((2, 3), bool), {"num_threads": 0}, ValueError, "at least 1, got 0"),
    ],
)
def test_rejects(keep, options, error, message):
    with pytest.raises(error, match=message):
        _C.kept_lists(keep, **options)
