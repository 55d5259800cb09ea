"""kept_o_proj against the projection of all heads."""

from __future__ import annotations

import torch
from op_comparison import SHAPES, compare, options_of, submodels

from bonsai_fast import ops
from bonsai_fast.testing.cases import assert_within_baseline, random_tensor
from bonsai_fast.testing.reference import kept_o_proj_reference


def dense(wave, a, weight, residual):
    """As long as if nothing were masked; the answer is another one, since `a` is compact."""
    padded = a.new_zeros(len(a), weight.shape[1])
    padded[:, : a[0].numel()] = a.flatten(1)
    return torch.addmm(residual, padded, weight.T)


def op(wave, a, weight, residual):
    return ops.kept_o_proj(a, weight, *wave.tables, None, residual)


IMPLS = {"dense": dense, "op": op}


@compare(shape=SHAPES, masked=[0.05, 0.5], impl=IMPLS)
def bench_kept_o_proj(benchmark, record_traffic, repeats, device, shape, masked, impl):
    hidden, heads, dim = (48, 3, 16) if shape is None else (
        shape.hidden_size, shape.num_attention_heads, shape.head_dim,
    )  # fmt: skip
    options = options_of(shape, device)
    wave = submodels(shape, heads, masked, device)
    a = random_tensor(wave.rows.num_rows, wave.kept.width, dim, **options)
    weight = random_tensor(hidden, heads * dim, scale=hidden**-0.5, seed=1, **options)
    residual = random_tensor(len(a), hidden, seed=2, **options)
    benchmark.group = f"kept_o_proj {shape} {len(a)} rows, {masked} masked"
    out = benchmark.pedantic(IMPLS[impl], args=(wave, a, weight, residual), **repeats)
    num_inputs = int(wave.kept.count[wave.rows.row_group.long()].sum()) * dim
    record_traffic(
        num_bytes=a.nbytes + weight.nbytes + 2 * out.nbytes,
        num_flops=2 * num_inputs * hidden,
        gemm=a.dtype,
    )
    if impl != "dense":

        def reference(a, weight, residual):
            rows = wave.rows.row_group
            return kept_o_proj_reference(a, weight, wave.keep, rows, None, residual)

        assert_within_baseline(out, reference, a, weight, residual)
