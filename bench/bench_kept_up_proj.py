"""kept_up_proj against a dense projection with masks and against copies of the kept weights."""

from __future__ import annotations

from functools import partial

from op_comparison import SHAPES, compare, options_of, submodels
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import assert_within_baseline, random_tensor
from bonsai_fast.testing.reference import kept_up_proj_reference

OPTIONS = {"activation": "silu", "gated": True}


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


@compare(shape=SHAPES, masked=[0.05, 0.5], impl=IMPLS)
def bench_kept_up_proj(benchmark, record_traffic, repeats, device, shape, masked, impl):
    hidden, width = (48, 90) if shape is None else (shape.hidden_size, shape.intermediate_size)
    options = options_of(shape, device)
    wave = submodels(shape, width, masked, device, multiple=128)
    x = random_tensor(wave.rows.num_rows, hidden, **options)
    weight = random_tensor(2 * width, hidden, scale=hidden**-0.5, seed=1, **options)
    benchmark.group = f"kept_up_proj {shape} {len(x)} rows, {masked} masked"
    out = benchmark.pedantic(IMPLS[impl], args=(wave, x, weight), **repeats)
    num_outputs = int(wave.kept.count[wave.rows.row_group.long()].sum())
    record_traffic(
        num_bytes=x.nbytes + weight.nbytes + num_outputs * x.itemsize,
        num_flops=4 * num_outputs * hidden,
        gemm=x.dtype,
    )
    if impl != "dense":
        reference = partial(kept_up_proj_reference, width=wave.kept.width, **OPTIONS)
        assert_within_baseline(out, reference, x, weight, wave.keep, wave.rows.row_group)
