"""kept_up_proj: [T, H] x [2I, H] -> [T, width]; each row's kept channels, zeros beyond them."""

from __future__ import annotations

import pytest
import torch
from op_paths import both, refusals
from projection_tests import InputProjectionTests

from bonsai_fast import ops
from bonsai_fast.testing.cases import (
    KERNEL_DTYPES,
    assert_within_baseline,
    random_tensor,
    random_wave,
)
from bonsai_fast.testing.reference import kept_up_proj_reference

pytest.importorskip("triton")

from bonsai_fast.ops._groups import ACTIVATIONS

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

FUNCTIONS = both(ops.kept_up_proj)
SILU = {"activation": "silu", "gated": True}
# rows of every sub-model, hidden size, channels; sub-models keep 70 %, none, all, one
SHAPES = [
    pytest.param([128, 128, 256], 128, 256, id="aligned"),
    pytest.param([130, 3, 5, 2], 72, 90, id="ragged"),
    pytest.param([1] * 10, 33, 200, id="many-tiles"),
    pytest.param([1], 1, 1, id="one"),
]


def make(sizes, hidden_size, num_channels, *, gated=True, bias=False, dtype=torch.float32, device):
    """The wave, x, weight and bias."""
    wave = random_wave(sizes, num_channels, multiple=128, device=device)
    num_rows = num_channels * (2 if gated else 1)
    options = {"dtype": dtype, "device": device}
    x = random_tensor(sum(sizes), hidden_size, **options)
    scale = hidden_size**-0.5
    weight = random_tensor(num_rows, hidden_size, seed=1, scale=scale, **options)
    return wave, x, weight, random_tensor(num_rows, seed=2, **options) if bias else None


def run(function, wave, x, weight, bias, **options):
    return function(x, weight, *wave.tables, bias, **options)


def check(function, wave, x, weight, bias, **options):
    actual = run(function, wave, x, weight, bias, **options)
    floats = [x, weight] if bias is None else [x, weight, bias]

    def reference(x, weight, bias=None):
        return kept_up_proj_reference(
            x, weight, wave.keep, wave.rows.row_group, bias, width=wave.kept.width, **options
        )

    assert_within_baseline(actual, reference, *floats)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("sizes, hidden_size, num_channels", SHAPES)
def test_agrees_with_reference(sizes, hidden_size, num_channels, gated, dtype, function, device):
    case = make(sizes, hidden_size, num_channels, gated=gated, dtype=dtype, device=device)
    check(function, *case, activation="silu", gated=gated)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_a_bias(activation, gated, function, device):
    case = make([3, 1, 4, 2], 40, 90, gated=gated, bias=True, device=device)
    check(function, *case, activation=activation, gated=gated)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_submodel_uses_its_own_list(function, device):
    """A wrong sub-model or channel must show: channel i's weight is i, and masks are disjoint."""
    keep = torch.arange(130)[None] % 4 == torch.arange(4)[:, None]
    kept = ops.KeptLists.of(keep, multiple=128, device=device)
    plan = ops.RowPlan.of([2, 130, 1, 3], device=device)
    x = torch.ones(plan.num_rows, 16, device=device)
    weight = (torch.arange(130.0, device=device) / 16)[:, None].expand(-1, 16).contiguous()
    out = function(x, weight, kept.index, kept.count, plan.tiles, activation="relu", gated=False)
    for row, group in enumerate(plan.row_group.tolist()):
        expected = keep[group].nonzero()[:, 0].float()
        assert torch.equal(out[row, : len(expected)].cpu(), expected)
        assert out[row, len(expected) :].eq(0).all()


class TestKeptUpProj(InputProjectionTests):
    op = ops.kept_up_proj
    make = staticmethod(make)
    multiple = 128
    SMALL, WIDE, OPTIONS = (40, 90), (72, 90), SILU

    def weight_rows(self, units):
        return units.repeat(2)


def test_opcheck(device):
    wave, x, weight, bias = make([3, 2, 1, 4], 40, 90, bias=True, device=device)
    torch.library.opcheck(ops.kept_up_proj, (x, weight, *wave.tables, bias), SILU)


WAVE, X, WEIGHT, BIAS = make([2, 1], 8, 4, bias=True, device="cpu")
INDEX, COUNT, TILES = WAVE.kept.index, WAVE.kept.count, WAVE.rows.tiles
RIGHT = {"x": X, "weight": WEIGHT, "index": INDEX, "count": COUNT, "tiles": TILES, "bias": BIAS}
WRONG = [
    pytest.param({"x": X[0]}, r"x must be \[T, H\], got \[8\]", id="dims"),
    pytest.param({"x": X.double()}, "x must be float16", id="dtype"),
    pytest.param({"weight": WEIGHT.half()}, "weight must be float32, got torch.float16", id="mix"),
    pytest.param({"weight": WEIGHT[:, 1:]}, r"weight must be \[any, 8\], got \[8, 7\]", id="H"),
    pytest.param({"weight": WEIGHT[1:]}, "gate then up", id="odd"),
    pytest.param({"index": INDEX.long()}, "index must be int32", id="index-type"),
    pytest.param({"index": INDEX[:, 1:]}, r"multiple of 128, got \[2, 255\]", id="index-width"),
    pytest.param({"count": COUNT[1:]}, r"count must be \[2\], got \[1\]", id="count"),
    pytest.param({"tiles": TILES[:, :2]}, r"tiles must be \[any, 3\]", id="tiles"),
    pytest.param({"tiles": TILES[:, None]}, r"tiles must be \[any, 3\]", id="tiles-dims"),
    pytest.param({"tiles": torch.cat([TILES, TILES])[::2]}, "tiles must be contig", id="strided"),
    pytest.param({"bias": BIAS[1:]}, r"bias must be \[8\], got \[7\]", id="bias"),
    pytest.param({"bias": BIAS.to("meta")}, "bias must be on cpu, got meta", id="device"),
    pytest.param({"activation": "tanh"}, "activation must be one of", id="activation"),
    pytest.param(
        {"weight": torch.empty(1, device="meta").expand(1 << 30, 8), "x": X.to("meta")},
        "contiguous along its last dim",
        id="expanded",
    ),
    pytest.param(
        {"weight": torch.empty(1 << 28, 8, device="meta"), "x": X.to("meta")},
        r"fewer than 2\^31 elements",
        id="too-large",
    ),
]


test_says_what_is_wrong = refusals(ops.kept_up_proj, RIGHT | SILU, WRONG)
