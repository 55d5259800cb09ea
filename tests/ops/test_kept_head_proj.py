"""kept_head_proj: [T, H] x [heads * D, H] -> [T, slots, D]; every row's heads, maybe rotated."""

from __future__ import annotations

import pytest
import torch
from op_paths import both, refusals
from projection_tests import InputProjectionTests
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import (
    KERNEL_DTYPES,
    assert_within_baseline,
    random_tensor,
    random_wave,
)
from bonsai_fast.testing.reference import kept_head_proj_reference

pytest.importorskip("triton")


pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

FUNCTIONS = both(ops.kept_head_proj)
# rows of every sub-model, hidden size, heads, head_dim; sub-models keep 70 %, none, all, one
SHAPES = [
    pytest.param([128, 128, 256], 128, 2, 128, id="aligned"),
    pytest.param([130, 3, 5, 2], 72, 5, 80, id="ragged"),
    pytest.param([1] * 10, 33, 9, 64, id="many-tiles"),
    pytest.param([2, 1, 3], 24, 3, 6, id="tiny-heads"),
    pytest.param([1], 1, 1, 2, id="one"),
]


def make(sizes, hidden_size, num_heads, head_dim, *, dtype=torch.float32, device):
    """The wave, x and weight."""
    wave = random_wave(sizes, num_heads, device=device)
    options = {"dtype": dtype, "device": device}
    x = random_tensor(sum(sizes), hidden_size, **options)
    scale = hidden_size**-0.5
    return wave, x, random_tensor(num_heads * head_dim, hidden_size, seed=1, scale=scale, **options)


def rope(num_rows, rotary_dim, *, device):
    """cos, sin and positions; rows sit at positions out of order."""
    angle = torch.outer(torch.arange(50.0), 100.0 ** -torch.linspace(0, 1, rotary_dim // 2))
    positions = torch.arange(num_rows) * 7 % 50
    return angle.cos().to(device), angle.sin().to(device), positions.to(device)


def check(function, wave, x, weight, *optional, head_dim, **options):
    """`optional`: bias, norm_weight, cos, sin, positions or None for each."""
    actual = function(x, weight, *wave.tables, *optional, head_dim=head_dim, **options)

    def reference(x, weight, *given):
        rest = iter(given)
        return kept_head_proj_reference(
            *(x, weight, wave.keep, wave.rows.row_group),
            *(None if part is None else next(rest) for part in optional),
            num_slots=wave.kept.width,
            **options,
        )

    given = (part for part in optional if part is not None)
    assert_within_baseline(actual, reference, x, weight, *given)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("sizes, hidden_size, num_heads, head_dim", SHAPES)
def test_agrees_with_reference(sizes, hidden_size, num_heads, head_dim, dtype, function, device):
    case = make(sizes, hidden_size, num_heads, head_dim, dtype=dtype, device=device)
    check(function, *case, head_dim=head_dim)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "head_dim, rotary_dim, has_bias, has_norm",
    [
        pytest.param(64, 64, False, False, id="Llama-3.2"),
        pytest.param(128, 128, True, False, id="Qwen2"),
        pytest.param(128, 128, False, True, id="Qwen3"),
        pytest.param(80, 32, True, False, id="Phi-2"),
        pytest.param(80, 80, True, True, id="everything-padded"),
        pytest.param(6, 2, True, True, id="tiny"),
        pytest.param(64, 0, True, True, id="no-rotation"),
    ],
)
def test_bias_norm_and_rotation(head_dim, rotary_dim, has_bias, has_norm, function, device):
    wave, x, weight = make([3, 2, 4, 1], 40, 3, head_dim, device=device)
    check(
        function,
        *(wave, x, weight),
        random_tensor(len(weight), seed=3, device=device) if has_bias else None,
        random_tensor(head_dim, seed=4, device=device) if has_norm else None,
        *(rope(10, rotary_dim, device=device) if rotary_dim else (None, None, None)),
        head_dim=head_dim,
        norm_eps=1e-6,
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_rotation_keeps_lengths_and_moves_with_the_position(function, device):
    """Position 0 rotates nothing; a rotation keeps the length of every head."""
    wave, x, weight = make([2, 1, 3], 40, 3, 64, device=device)
    cos, sin, positions = rope(6, 64, device=device)
    options = {"head_dim": 64}
    plain = function(x, weight, *wave.tables, **options)
    zero = torch.zeros_like(positions)
    still = function(x, weight, *wave.tables, cos=cos, sin=sin, positions=zero, **options)
    turned = function(x, weight, *wave.tables, cos=cos, sin=sin, positions=positions, **options)
    torch.testing.assert_close(still, plain)
    torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1))
    assert (turned[3:] - plain[3:]).abs().max() > 0.1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_norm_is_that_of_torch(function, device):
    wave, x, weight = make([2, 1, 3], 40, 3, 80, device=device)
    norm = random_tensor(80, seed=4, device=device)
    options = {"head_dim": 80}
    plain = function(x, weight, *wave.tables, **options)
    normed = function(x, weight, *wave.tables, norm_weight=norm, norm_eps=1e-3, **options)
    torch.testing.assert_close(normed, F.rms_norm(plain, (80,), norm, 1e-3))


class TestKeptHeadProj(InputProjectionTests):
    op = ops.kept_head_proj
    make = staticmethod(make)
    SMALL, WIDE = (40, 9, 16), (72, 5, 64)

    def run(self, function, wave, x, weight, **options):
        head_dim = len(weight) // wave.keep.shape[1]
        return function(x, weight, *wave.tables, head_dim=head_dim, **options)

    def options(self, num_rows, device):
        cos, sin, positions = rope(num_rows, 16, device=device)
        norm_weight = torch.ones(16, device=device)
        return {"norm_weight": norm_weight, "cos": cos, "sin": sin, "positions": positions}

    def weight_rows(self, units):
        return units.repeat_interleave(16)


def test_opcheck(device):
    wave, x, weight = make([3, 2, 1, 4], 40, 5, 16, device=device)
    torch.library.opcheck(ops.kept_head_proj, (x, weight, *wave.tables), {"head_dim": 16})
    bias, norm = random_tensor(80, device=device), random_tensor(16, device=device)
    torch.library.opcheck(
        ops.kept_head_proj,
        (x, weight, *wave.tables, bias, norm, *rope(10, 8, device=device)),
        {"head_dim": 16, "norm_eps": 1e-6},
    )


WAVE, X, WEIGHT = make([2, 1], 8, 3, 4, device="cpu")
COS, SIN, POSITIONS = rope(3, 4, device="cpu")
INDEX, COUNT, TILES = WAVE.tables
RIGHT = {
    "x": X,
    "weight": WEIGHT,
    "index": INDEX,
    "count": COUNT,
    "tiles": TILES,
    "cos": COS,
    "sin": SIN,
    "positions": POSITIONS,
    "head_dim": 4,
}
WRONG = [
    pytest.param({"x": X[0]}, r"x must be \[T, H\], got \[8\]", id="dims"),
    pytest.param({"weight": WEIGHT.half()}, "weight must be float32", id="mix"),
    pytest.param({"head_dim": 3}, "even and divide the 12 rows of weight, got 3", id="odd"),
    pytest.param({"head_dim": 8}, "even and divide the 12 rows of weight, got 8", id="head_dim"),
    pytest.param({"index": INDEX[:, 3:]}, r"index must be \[K, width \+ 128\]", id="index"),
    pytest.param({"bias": X[0]}, r"bias must be \[12\], got \[8\]", id="bias"),
    pytest.param({"norm_weight": X[0]}, r"norm_weight must be \[4\], got \[8\]", id="norm"),
    pytest.param({"cos": None}, "cos, sin and positions must come together", id="no-cos"),
    pytest.param({"positions": None}, "must come together", id="no-positions"),
    pytest.param({"cos": COS.half()}, "cos must be float32", id="cos-dtype"),
    pytest.param({"cos": torch.ones(50, 3)}, r"R in 2..4, got \[50, 3\]", id="cos-width"),
    pytest.param({"sin": SIN[1:]}, r"sin must be \[50, 2\], got \[49, 2\]", id="sin"),
    pytest.param({"sin": torch.ones(50, 4)[:, :2]}, "strides of cos", id="sin-strides"),
    pytest.param({"positions": POSITIONS.int()}, "positions must be int64", id="positions"),
]


test_says_what_is_wrong = refusals(ops.kept_head_proj, RIGHT, WRONG)
