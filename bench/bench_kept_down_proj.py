"""kept_down_proj against a dense projection and against copies of the kept weights."""

from __future__ import annotations

import torch
from op_comparison import SHAPES, compare, options_of, submodels

from bonsai_fast import ops
from bonsai_fast.testing.cases import assert_within_baseline, random_tensor
from bonsai_fast.testing.reference import kept_down_proj_reference


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


@compare(shape=SHAPES, masked=[0.05, 0.5], impl=IMPLS)
def bench_kept_down_proj(benchmark, record_traffic, repeats, device, shape, masked, impl):
    hidden, width = (48, 90) if shape is None else (shape.hidden_size, shape.intermediate_size)
    options = options_of(shape, device)
    wave = submodels(shape, width, masked, device, multiple=128)
    a = random_tensor(wave.rows.num_rows, wave.kept.width, **options)
    count = wave.kept.count[wave.rows.row_group.long()][:, None]
    a[torch.arange(wave.kept.width, device=device) >= count] = 0
    weight_t = random_tensor(width, hidden, scale=width**-0.5, seed=1, **options)
    residual = random_tensor(len(a), hidden, seed=2, **options)
    benchmark.group = f"kept_down_proj {shape} {len(a)} rows, {masked} masked"
    out = benchmark.pedantic(IMPLS[impl], args=(wave, a, weight_t, residual), **repeats)
    record_traffic(
        num_bytes=a.nbytes + weight_t.nbytes + 2 * out.nbytes,
        num_flops=2 * int(count.sum()) * hidden,
        gemm=a.dtype,
    )
    if impl != "dense":

        def reference(a, weight_t, residual):
            group = wave.rows.row_group
            return kept_down_proj_reference(a, weight_t, wave.keep, group, None, residual)

        assert_within_baseline(out, reference, a, weight_t, residual)
