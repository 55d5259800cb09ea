"""kept_down_proj against a dense projection and against copies of the kept weights."""

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
from bonsai_fast.testing.reference import kept_down_proj_reference

NUM_GROUPS = 4
ROWS_PER_GROUP = {"cpu": 64, "cuda": 1024}
SHAPES = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape, id=shape.name) for shape in MODEL_SHAPES),
]


def dense(wave, a, weight_t, residual):
    """As long as if nothing were masked; the answer is another one, since `a` is compact."""
    padded = a.new_zeros(len(a), len(weight_t))
    num_slots = min(a.shape[1], len(weight_t))
    padded[:, :num_slots] = a[:, :num_slots]
    return torch.addmm(residual, padded, weight_t)


def sliced(wave, a, weight_t, residual):
    """Every sub-model's kept rows are copied, then multiplied."""
    out = torch.empty_like(residual)
    parts = (tensor.split(wave.rows.sizes) for tensor in (out, a, residual))
    for group, (rows, inputs, base) in enumerate(zip(*parts, strict=True)):
        kept = wave.keep[group].nonzero()[:, 0]
        torch.addmm(base, inputs[:, : len(kept)], weight_t[kept], out=rows)
    return out


def op(wave, a, weight_t, residual):
    return ops.kept_down_proj(a, weight_t, *wave.tables, None, residual)


IMPLS = {"dense": dense, "sliced": sliced, "op": op}


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [0.05, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def bench_kept_down_proj(benchmark, record_traffic, repeats, device, shape, masked, impl):
    hidden, width, size = (48, 90, 3) if shape is None else (
        shape.hidden_size, shape.intermediate_size, ROWS_PER_GROUP[device.type]
    )  # fmt: skip
    options = {"dtype": torch.float32 if shape is None else torch.bfloat16, "device": device}
    keep = torch.rand(NUM_GROUPS, width, generator=torch.Generator().manual_seed(0)) >= masked
    wave = Wave.of(keep, [size] * NUM_GROUPS, multiple=128, device=device)
    a = random_tensor(size * NUM_GROUPS, wave.kept.width, **options)
    count = wave.kept.count[wave.rows.row_group.long()][:, None]
    a[torch.arange(wave.kept.width, device=device) >= count] = 0
    weight_t = random_tensor(width, hidden, scale=width**-0.5, seed=1, **options)
    residual = random_tensor(len(a), hidden, seed=2, **options)
    benchmark.group = f"kept_down_proj {shape} {len(a)} rows, {masked} masked"
    out = benchmark.pedantic(IMPLS[impl], args=(wave, a, weight_t, residual), **repeats)
    record_traffic(
        num_bytes=a.nbytes + weight_t.nbytes + 2 * out.nbytes,
        num_flops=2 * size * int(keep.sum()) * hidden,
        gemm=options["dtype"],
    )
    if impl != "dense":

        def reference(a, weight_t, residual):
            group = wave.rows.row_group
            return kept_down_proj_reference(a, weight_t, wave.keep, group, None, residual)

        assert_within_baseline(out, reference, a, weight_t, residual)
