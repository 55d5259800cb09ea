"""kept_o_proj: [T, slots, D] x [N, heads * D] -> [T, N], kept heads, onto the residual stream."""

from __future__ import annotations

import math

import pytest
import torch
from op_paths import both, refusals
from projection_tests import OutputProjectionTests

from bonsai_fast import ops
from bonsai_fast.testing.cases import (
    KERNEL_DTYPES,
    assert_within_baseline,
    random_tensor,
    random_wave,
)
from bonsai_fast.testing.reference import kept_o_proj_reference

pytest.importorskip("triton")


pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

FUNCTIONS = both(ops.kept_o_proj)
# rows of every sub-model, heads, head_dim, outputs; sub-models keep 70 %, none, all, one
SHAPES = [
    pytest.param([128, 128, 256], 2, 128, 256, id="aligned"),
    pytest.param([130, 3, 5, 2], 5, 80, 72, id="ragged"),
    pytest.param([1] * 10, 9, 64, 300, id="many-tiles"),
    pytest.param([2, 1, 3], 4, 96, 41, id="blocks-of-32"),
    pytest.param([1], 1, 16, 1, id="one"),
]


def make(sizes, num_heads, head_dim, num_outputs, *, dtype=torch.float32, device):
    """The wave, a, weight, bias and residual; slots that nobody may read are NaN."""
    wave = random_wave(sizes, num_heads, device=device)
    options = {"dtype": dtype, "device": device}
    a = random_tensor(sum(sizes), wave.kept.width, head_dim, **options)
    count = wave.kept.count[wave.rows.row_group.long()][:, None]
    a[torch.arange(wave.kept.width, device=device) >= count] = math.nan
    width = num_heads * head_dim
    weight = random_tensor(num_outputs, width, seed=1, scale=width**-0.5, **options)
    bias = random_tensor(num_outputs, seed=2, **options)
    return wave, a, weight, bias, random_tensor(sum(sizes), num_outputs, seed=3, **options)


def run(function, wave, a, weight, bias=None, residual=None):
    return function(a, weight, *wave.tables, bias, residual)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("sizes, num_heads, head_dim, num_outputs", SHAPES)
def test_agrees_with_reference(sizes, num_heads, head_dim, num_outputs, dtype, function, device):
    wave, *floats = make(sizes, num_heads, head_dim, num_outputs, dtype=dtype, device=device)

    def reference(a, weight, bias, residual):
        return kept_o_proj_reference(a, weight, wave.keep, wave.rows.row_group, bias, residual)

    assert_within_baseline(run(function, wave, *floats), reference, *floats)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_head_finds_its_own_columns(function, device):
    """A wrong head or block must show: `a` picks single columns, whose number they hold."""
    keep = torch.tensor([[True, False, True, False], [False, True, False, True]])
    kept = ops.KeptLists.of(keep, device=device)
    tiles = ops.RowPlan.of([160, 160], device=device).tiles
    a = torch.eye(160, device=device).repeat(2, 1).view(320, 2, 80)
    weight = torch.arange(320.0, device=device).expand(3, -1).contiguous()
    out = function(a, weight, kept.index, kept.count, tiles)
    columns = [keep[group].repeat_interleave(80).nonzero()[:, 0] for group in (0, 1)]
    expected = torch.cat(columns).float().to(device)
    assert torch.equal(out, expected[:, None].expand(-1, 3))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_removed_heads_may_hold_anything(function, device):
    wave, a, weight, bias, residual = make([3, 2], 9, 16, 72, device=device)
    removed = ~wave.keep.any(dim=0)
    assert removed.any()
    weight[:, removed.repeat_interleave(16)] = math.nan
    assert run(function, wave, a, weight, bias, residual).isfinite().all()


def test_projections_and_attention_are_the_masked_layer(device):
    """All ops of attention in a row equal the whole layer with its removed heads zeroed."""
    sizes, heads, kv_heads, dim, hidden = [5, 3, 130, 1], 6, 2, 16, 40
    wave = random_wave(sizes, heads, device=device)
    x = random_tensor(139, hidden, device=device)
    scale = hidden**-0.5
    wq, wk, wv = (
        random_tensor(count * dim, hidden, seed=seed, scale=scale, device=device)
        for seed, count in enumerate((heads, kv_heads, kv_heads), 1)
    )
    wo = random_tensor(hidden, heads * dim, seed=4, scale=0.1, device=device)
    lists = ops.HeadLists.of(wave.keep.cpu(), num_kv_heads=kv_heads, device=device)
    kv, q_to_kv = lists.kv, lists.q_to_kv
    q = ops.kept_head_proj(x, wq, *wave.tables, head_dim=dim)
    k, v = (
        ops.kept_head_proj(x, w, kv.index, kv.count, wave.rows.tiles, head_dim=dim)
        for w in (wk, wv)
    )
    tiles = ops.SequencePlan.of(sizes, range(4), device=device).tiles
    attended = ops.grouped_attention(q, k, v, wave.kept.count, q_to_kv, tiles, scale=0.25)
    out = ops.kept_o_proj(attended, wo, *wave.tables, None, x)

    begin = 0
    for group, size in enumerate(sizes):
        rows = x[begin : begin + size]
        q, k, v = ((rows @ w.T).view(size, -1, dim).transpose(0, 1) for w in (wq, wk, wv))
        dense = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=0.25, enable_gqa=True
        )[0]
        masked = dense * wave.keep[group][:, None, None]
        expected = rows + masked.transpose(0, 1).flatten(1) @ wo.T
        torch.testing.assert_close(out[begin : begin + size], expected)
        begin += size


class TestKeptOProj(OutputProjectionTests):
    op = ops.kept_o_proj
    make = staticmethod(make)
    reference = staticmethod(kept_o_proj_reference)
    SMALL, WIDE = (5, 16, 72), (5, 64, 72)


WAVE, A, WEIGHT, BIAS, RESIDUAL = make([2, 1], 3, 16, 8, device="cpu")
INDEX, COUNT, TILES = WAVE.tables
RIGHT = {
    "a": A,
    "weight": WEIGHT,
    "index": INDEX,
    "count": COUNT,
    "tiles": TILES,
    "bias": BIAS,
    "residual": RESIDUAL,
}
WRONG = [
    pytest.param({"a": A[0]}, r"a must be \[T, slots, D\], got", id="dims"),
    pytest.param({"a": torch.ones(3, 2, 24)}, "multiple of 16, got 24", id="head_dim"),
    pytest.param({"a": torch.ones(2, 3, 16).transpose(0, 1)}, "side by side", id="layout"),
    pytest.param({"a": torch.ones(3, 5, 16)}, "a must have the index's . slots, got 5", id="slots"),
    pytest.param({"weight": WEIGHT[:, :40]}, r"whole heads of 16, got \[8, 40\]", id="part-head"),
    pytest.param({"weight": WEIGHT.half()}, "weight must be float32", id="mix"),
    pytest.param({"bias": BIAS[1:]}, r"bias must be \[8\], got \[7\]", id="bias"),
    pytest.param({"residual": RESIDUAL[1:]}, r"residual must be \[3, 8\], got", id="residual"),
]


test_says_what_is_wrong = refusals(ops.kept_o_proj, RIGHT, WRONG)
