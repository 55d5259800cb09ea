"""kept_up_proj against a dense projection with masks and against copies of the kept weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import (
    MODEL_SHAPES,
    Wave,
    assert_within_baseline,
    random_tensor,
    synchronized_timer,
)
from bonsai_fast.testing.reference import kept_up_proj_reference

OPTIONS = {"activation": "silu", "gated": True}
NUM_GROUPS = 4
ROWS_PER_GROUP = {"cpu": 64, "cuda": 1024}
SHAPES = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape, id=shape.name) for shape in MODEL_SHAPES),
]


def dense(wave, x, weight):
    """All channels, then the masks: nothing is compact, nothing saved."""
    keep, row_group = wave.keep, wave.rows.row_group
    return ops.glu_mask(F.linear(x, weight), keep, row_group, **OPTIONS)


def sliced(wave, x, weight):
    """Every sub-model's kept rows are copied, then multiplied."""
    out = x.new_zeros(len(x), wave.kept.width)
    for group, rows in enumerate(out.split(wave.rows.sizes)):
        kept = wave.keep[group].nonzero()[:, 0]
        inputs = x.split(wave.rows.sizes)[group]
        gate, up = inputs @ weight[kept].T, inputs @ weight[len(weight) // 2 + kept].T
        rows[:, : len(kept)] = F.silu(gate) * up
    return out


def op(wave, x, weight):
    return ops.kept_up_proj(x, weight, *wave.tables, **OPTIONS)


IMPLS = {"dense": dense, "sliced": sliced, "op": op}


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [0.05, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def bench_kept_up_proj(benchmark, record_traffic, repeats, device, shape, masked, impl):
    hidden, width, size = (48, 90, 3) if shape is None else (
        shape.hidden_size, shape.intermediate_size, ROWS_PER_GROUP[device.type]
    )  # fmt: skip
    dtype = torch.float32 if shape is None else torch.bfloat16
    keep = torch.rand(NUM_GROUPS, width, generator=torch.Generator().manual_seed(0)) >= masked
    wave = Wave.of(keep, [size] * NUM_GROUPS, multiple=128, device=device)
    x = random_tensor(size * NUM_GROUPS, hidden, dtype=dtype, device=device)
    scale = hidden**-0.5
    weight = random_tensor(2 * width, hidden, scale=scale, dtype=dtype, device=device, seed=1)
    benchmark.group = f"kept_up_proj {shape} {len(x)} rows, {masked} masked"
    out = benchmark.pedantic(IMPLS[impl], args=(wave, x, weight), **repeats)
    record_traffic(
        num_bytes=x.nbytes + weight.nbytes + len(x) * int(keep.sum()) // NUM_GROUPS * x.itemsize,
        num_flops=4 * size * int(keep.sum()) * hidden,
        gemm=dtype,
    )
    if impl != "dense":
        reference = partial(kept_up_proj_reference, width=wave.kept.width, **OPTIONS)
        assert_within_baseline(out, reference, x, weight, wave.keep, wave.rows.row_group)
