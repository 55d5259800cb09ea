"""kept_down_proj: [T, width] x [I, N] -> [T, N], kept channels alone, onto the residual stream."""

from __future__ import annotations

import math

import pytest
import torch
from op_paths import both, refusals
from projection_tests import OutputProjectionTests

from bonsai_fast import ops
from bonsai_fast.testing.cases import (
    KERNEL_DTYPES,
    Wave,
    assert_within_baseline,
    random_keep,
    random_tensor,
    random_wave,
)
from bonsai_fast.testing.reference import kept_down_proj_reference

pytest.importorskip("triton")


pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

FUNCTIONS = both(ops.kept_down_proj)
# rows of every sub-model, channels, outputs; sub-models keep 70 %, none, all, one
SHAPES = [
    pytest.param([128, 128, 256], 256, 256, id="aligned"),
    pytest.param([130, 3, 5, 2], 90, 72, id="ragged"),
    pytest.param([1] * 10, 200, 300, id="many-tiles"),
    pytest.param([1], 1, 1, id="one"),
]


def make(sizes, num_channels, num_outputs, *, dtype=torch.float32, device):
    """The wave, a, weight_t, bias and residual; slots that nobody may read are NaN."""
    wave = random_wave(sizes, num_channels, multiple=128, device=device)
    options = {"dtype": dtype, "device": device}
    a = random_tensor(sum(sizes), wave.kept.width, **options)
    count = wave.kept.count[wave.rows.row_group.long()][:, None]
    slots = torch.arange(wave.kept.width, device=device)
    a[slots >= count] = 0
    a[slots >= (count + 127) // 128 * 128] = math.nan
    scale = num_channels**-0.5
    weight_t = random_tensor(num_channels, num_outputs, seed=1, scale=scale, **options)
    bias = random_tensor(num_outputs, seed=2, **options)
    return wave, a, weight_t, bias, random_tensor(sum(sizes), num_outputs, seed=3, **options)


def run(function, wave, a, weight_t, bias=None, residual=None):
    return function(a, weight_t, *wave.tables, bias, residual)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("sizes, num_channels, num_outputs", SHAPES)
def test_agrees_with_reference(sizes, num_channels, num_outputs, dtype, function, device):
    wave, *floats = make(sizes, num_channels, num_outputs, dtype=dtype, device=device)

    def reference(a, weight_t, bias, residual):
        group = wave.rows.row_group
        return kept_down_proj_reference(a, weight_t, wave.keep, group, bias, residual)

    assert_within_baseline(run(function, wave, *floats), reference, *floats)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_removed_channels_may_hold_anything(function, device):
    """What a kernel reads past a list's end must be a channel that is kept: 0 * NaN is NaN."""
    keep = random_keep(2, 90)
    keep[:, :3] = False
    wave = Wave.of(keep, [3, 2], multiple=128, device=device)
    a = random_tensor(5, 128, device=device)
    a[:, int(wave.kept.count[0]) :] = 0
    weight_t = random_tensor(90, 72, seed=1, device=device)
    weight_t[~wave.keep.any(dim=0)] = math.nan
    assert run(function, wave, a, weight_t).isfinite().all()


def test_up_and_down_are_the_masked_mlp(device):
    """Both ops in a row equal the whole MLP with its masked channels zeroed."""
    wave = random_wave([5, 2, 130, 1], 90, multiple=128, device=device)
    x = random_tensor(138, 72, device=device)
    gate_up = random_tensor(180, 72, seed=1, scale=0.1, device=device)
    down = random_tensor(72, 90, seed=2, scale=0.1, device=device)
    a = ops.kept_up_proj(x, gate_up, *wave.tables, activation="silu", gated=True)
    out = ops.kept_down_proj(a, down.T.contiguous(), *wave.tables, None, x)
    masked = ops.glu_mask(
        x @ gate_up.T, wave.keep, wave.rows.row_group, activation="silu", gated=True
    )
    torch.testing.assert_close(out, x + masked @ down.T)


class TestKeptDownProj(OutputProjectionTests):
    op = ops.kept_down_proj
    make = staticmethod(make)
    reference = staticmethod(kept_down_proj_reference)
    multiple = 128
    SMALL, WIDE = (90, 72), (90, 72)


WAVE, A, WEIGHT, BIAS, RESIDUAL = make([2, 1], 4, 8, device="cpu")
RIGHT = {
    "a": A,
    "weight_t": WEIGHT,
    "index": WAVE.kept.index,
    "count": WAVE.kept.count,
    "tiles": WAVE.rows.tiles,
    "bias": BIAS,
    "residual": RESIDUAL,
}
WRONG = [
    pytest.param({"a": A[0]}, r"a must be \[T, width\], got \[128\]", id="dims"),
    pytest.param({"a": A[:, :64]}, "a must have the index's 128 slots, got 64", id="width"),
    pytest.param({"weight_t": WEIGHT.T}, "weight_t must be contiguous along its last", id="layout"),
    pytest.param({"weight_t": WEIGHT.half()}, "weight_t must be float32", id="mix"),
    pytest.param({"bias": BIAS[1:]}, r"bias must be \[8\], got \[7\]", id="bias"),
    pytest.param({"residual": RESIDUAL[1:]}, r"residual must be \[3, 8\], got", id="residual"),
]


test_says_what_is_wrong = refusals(ops.kept_down_proj, RIGHT, WRONG)
