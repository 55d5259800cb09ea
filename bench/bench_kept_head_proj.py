"""kept_head_proj against projecting all heads and rotating them afterwards."""

from __future__ import annotations

import torch
from op_comparison import SHAPES, compare, options_of, submodels
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import assert_within_baseline, random_tensor
from bonsai_fast.testing.reference import kept_head_proj_reference


def dense(wave, x, weight, cos, sin, positions):
    """What a Hugging Face layer does for all heads."""
    heads = F.linear(x, weight).view(len(x), wave.keep.shape[1], -1)
    cosine, sine = (table[positions].repeat(1, 2)[:, None].to(x.dtype) for table in (cos, sin))
    left, right = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-right, left], dim=-1) * sine


def op(wave, x, weight, cos, sin, positions):
    rope = {"cos": cos, "sin": sin, "positions": positions}
    return ops.kept_head_proj(x, weight, *wave.tables, **rope, head_dim=2 * cos.shape[1])


IMPLS = {"dense": dense, "op": op}


@compare(shape=SHAPES, masked=[0.05, 0.5], impl=IMPLS)
def bench_kept_head_proj(benchmark, record_traffic, repeats, device, shape, masked, impl):
    hidden, heads, dim = (48, 3, 16) if shape is None else (
        shape.hidden_size, shape.num_attention_heads, shape.head_dim,
    )  # fmt: skip
    options = options_of(shape, device)
    wave = submodels(shape, heads, masked, device)
    x = random_tensor(wave.rows.num_rows, hidden, **options)
    weight = random_tensor(heads * dim, hidden, scale=hidden**-0.5, seed=1, **options)
    size = wave.rows.sizes[0]
    angle = torch.outer(torch.arange(float(size)), 1e4 ** -torch.linspace(0, 1, dim // 2))
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    positions = torch.arange(size, device=device).repeat(len(wave.keep))
    arguments = (x, weight, cos, sin, positions)
    benchmark.group = f"kept_head_proj {shape} {len(x)} rows, {masked} masked"
    out = benchmark.pedantic(IMPLS[impl], args=(wave, *arguments), **repeats)
    num_outputs = int(wave.kept.count[wave.rows.row_group.long()].sum()) * dim
    record_traffic(
        num_bytes=x.nbytes + weight.nbytes + num_outputs * x.itemsize,
        num_flops=2 * num_outputs * hidden,
        gemm=x.dtype,
    )
    if impl != "dense":

        def reference(x, weight, cos, sin):
            rows = wave.rows.row_group
            return kept_head_proj_reference(
                *(x, weight, wave.keep, rows, None, None, cos, sin, positions),
                num_slots=wave.kept.width,
            )

        assert_within_baseline(out, reference, x, weight, cos, sin)
