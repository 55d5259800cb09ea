"""kept_o_proj against the projection of all heads."""

from __future__ import annotations

import pytest
import torch

from bonsai_fast import ops
from bonsai_fast.testing.cases import (
    MODEL_SHAPES,
    Wave,
    assert_within_baseline,
    random_tensor,
    synchronized_timer,
)
from bonsai_fast.testing.reference import kept_o_proj_reference

NUM_GROUPS = 4
ROWS_PER_GROUP = {"cpu": 64, "cuda": 1024}
SHAPES = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape, id=shape.name) for shape in MODEL_SHAPES),
]


def dense(wave, a, weight, residual):
    """As long as if nothing were masked; the answer is another one, since `a` is compact."""
    padded = a.new_zeros(len(a), weight.shape[1])
    padded[:, : a[0].numel()] = a.flatten(1)
    return torch.addmm(residual, padded, weight.T)


def op(wave, a, weight, residual):
    return ops.kept_o_proj(a, weight, *wave.tables, None, residual)


IMPLS = {"dense": dense, "op": op}


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [0.05, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def bench_kept_o_proj(benchmark, record_traffic, repeats, device, shape, masked, impl):
    hidden, heads, dim, size = (48, 3, 16, 3) if shape is None else (
        shape.hidden_size, shape.num_attention_heads, shape.head_dim, ROWS_PER_GROUP[device.type]
    )  # fmt: skip
    options = {"dtype": torch.float32 if shape is None else torch.bfloat16, "device": device}
    keep = torch.rand(NUM_GROUPS, heads, generator=torch.Generator().manual_seed(0)) >= masked
    wave = Wave.of(keep, [size] * NUM_GROUPS, device=device)
    a = random_tensor(size * NUM_GROUPS, wave.kept.width, dim, **options)
    weight = random_tensor(hidden, heads * dim, scale=hidden**-0.5, seed=1, **options)
    residual = random_tensor(len(a), hidden, seed=2, **options)
    benchmark.group = f"kept_o_proj {shape} {len(a)} rows, {masked} masked"
    out = benchmark.pedantic(IMPLS[impl], args=(wave, a, weight, residual), **repeats)
    record_traffic(
        num_bytes=a.nbytes + weight.nbytes + 2 * out.nbytes,
        num_flops=2 * size * int(keep.sum()) * dim * hidden,
        gemm=options["dtype"],
    )
    if impl != "dense":

        def reference(a, weight, residual):
            rows = wave.rows.row_group
            return kept_o_proj_reference(a, weight, wave.keep, rows, None, residual)

        assert_within_baseline(out, reference, a, weight, residual)
