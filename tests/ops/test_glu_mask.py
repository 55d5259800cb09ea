"""glu_mask: [T, 2I] x bool [K, I] x [T] -> [T, I]; masked channels are exactly zero."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from op_paths import both, kernel_of, refusals

from bonsai_fast import ops
from bonsai_fast.testing.cases import (
    KERNEL_DTYPES,
    assert_within_baseline,
    random_keep,
    random_tensor,
)
from bonsai_fast.testing.reference import glu_mask_reference

pytest.importorskip("triton")

from bonsai_fast.ops._groups import ACTIVATIONS

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

KERNEL, FUNCTIONS = kernel_of(ops.glu_mask), both(ops.glu_mask)
# rows of every sub-model, channels
SHAPES = [
    pytest.param([8, 8, 8, 8], 1024, id="aligned"),
    pytest.param([3, 0, 5, 1, 2], 1090, id="ragged"),
    pytest.param([1], 1, id="one"),
    pytest.param([0, 0], 16, id="no-rows"),
]


def inputs(sizes, num_channels, *, gated=True, dtype=torch.float32, device="cpu"):
    width = 2 * num_channels if gated else num_channels
    gate_up = random_tensor(sum(sizes), width, dtype=dtype, device=device, scale=3)
    plan = ops.RowPlan.of(sizes, device=device)
    return gate_up, random_keep(len(sizes), num_channels).to(device), plan.row_group


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("sizes, num_channels", SHAPES)
def test_agrees_with_reference(sizes, num_channels, gated, dtype, function, device):
    arguments = inputs(sizes, num_channels, gated=gated, dtype=dtype, device=device)
    options = {"activation": "silu", "gated": gated}
    assert_within_baseline(
        function(*arguments, **options), partial(glu_mask_reference, **options), *arguments
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, function, device):
    """Also where exp overflows and where gelu's polynomial is huge."""
    arguments = inputs([5, 1, 4, 2], 90, device=device)
    arguments[0][0, :90] = torch.linspace(-200, 200, 90)
    options = {"activation": activation, "gated": True}
    assert_within_baseline(
        function(*arguments, **options), partial(glu_mask_reference, **options), *arguments
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masked_channels_are_zero_whatever_they_hold(function, device):
    """A mask that multiplies would let NaN and Inf of a removed channel through."""
    gate_up, keep, row_group = inputs([4, 4, 4, 4], 200, device=device)
    removed = ~keep[row_group.long()]
    gate_up[:, :200][removed] = math.nan
    gate_up[:, 200:][removed] = math.inf
    out = function(gate_up, keep, row_group, activation="silu", gated=True)
    assert out[removed].eq(0).all() and out.isfinite().all() and out[~removed].ne(0).any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_stays_in_its_place(function, device):
    gate_up, keep, row_group = inputs([2, 2, 2, 2], 90, device=device)
    keep[:] = True
    gate_up[3, 5], gate_up[4, 90 + 7] = math.nan, math.nan
    for activation in ACTIVATIONS:
        out = function(gate_up, keep, row_group, activation=activation, gated=True)
        assert out.isnan().nonzero().tolist() == [[3, 5], [4, 7]]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_takes_strided_rows(function, device):
    values, keep, row_group = inputs([4, 4], 90, device=device)
    wider = torch.full((16, 200), math.nan, device=device)[::2, 7:187].copy_(values)
    wide_keep = torch.zeros(4, 100, dtype=torch.bool, device=device)[::2, 3:93].copy_(keep)
    assert_within_baseline(
        function(wider, wide_keep, row_group, activation="silu", gated=True),
        partial(glu_mask_reference, activation="silu", gated=True),
        *(values, keep, row_group),
    )


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    """Row 65536 of 32768 columns lies 2^31 elements away."""
    gate_up = torch.zeros(65538, 32768, dtype=torch.bfloat16, device=device)
    gate_up[65536:] = random_tensor(2, 32768, dtype=torch.bfloat16, device=device)
    keep = torch.ones(1, 16384, dtype=torch.bool, device=device)
    rows = torch.zeros(65538, dtype=torch.int32, device=device)
    options = {"activation": "silu", "gated": True}
    out = KERNEL(gate_up, keep, rows, **options)
    assert torch.equal(out[65536:], KERNEL(gate_up[65536:], keep, rows[:2], **options))
    assert out[65535].eq(0).all() and out[65536].ne(0).any()


def test_opcheck(device):
    arguments = inputs([3, 2, 1, 4], 90, dtype=torch.float16, device=device)
    torch.library.opcheck(ops.glu_mask, arguments, {"activation": "gelu", "gated": True})
    plain = inputs([3, 2], 90, gated=False, device=device)
    torch.library.opcheck(ops.glu_mask, plain, {"activation": "relu", "gated": False})


X, KEEP, ROWS = inputs([2, 1], 4)
RIGHT = {"gate_up": X, "keep": KEEP, "row_group": ROWS, "activation": "silu", "gated": True}
WRONG = [
    pytest.param({"gate_up": X[0]}, r"gate_up must be \[T, 2I\], got \[8\]", id="dims"),
    pytest.param({"gate_up": X[:, 1:]}, r"gate then up, got \[3, 7\]", id="odd"),
    pytest.param({"gate_up": X.double()}, "gate_up must be float16", id="dtype"),
    pytest.param({"gate_up": X.t().contiguous().t()}, "contiguous", id="transposed"),
    pytest.param({"keep": KEEP.int()}, "keep must be bool, got torch.int32", id="keep-type"),
    pytest.param({"keep": KEEP[:, 1:]}, r"\[any, 4\], got \[2, 3\]", id="keep-shape"),
    pytest.param({"row_group": ROWS.long()}, "row_group must be int32", id="rows-type"),
    pytest.param({"row_group": ROWS[1:]}, r"row_group must be \[3\], got \[2\]", id="rows"),
    pytest.param({"keep": KEEP.to("meta")}, "keep must be on cpu, got meta", id="device"),
    pytest.param({"activation": "swish"}, "one of silu, .* got 'swish'", id="activation"),
]
test_says_what_is_wrong = refusals(ops.glu_mask, RIGHT, WRONG)
