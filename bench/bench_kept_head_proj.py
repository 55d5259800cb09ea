"""kept_head_proj against projecting all heads and rotating them afterwards."""

from __future__ import annotations

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
from bonsai_fast.testing.reference import kept_head_proj_reference

NUM_GROUPS = 4
ROWS_PER_GROUP = {"cpu": 64, "cuda": 1024}
SHAPES = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape, id=shape.name) for shape in MODEL_SHAPES),
]


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


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [0.05, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def bench_kept_head_proj(benchmark, record_traffic, repeats, device, shape, masked, impl):
    hidden, heads, dim, size = (48, 3, 16, 3) if shape is None else (
        shape.hidden_size, shape.num_attention_heads, shape.head_dim, ROWS_PER_GROUP[device.type]
    )  # fmt: skip
    options = {"dtype": torch.float32 if shape is None else torch.bfloat16, "device": device}
    keep = torch.rand(NUM_GROUPS, heads, generator=torch.Generator().manual_seed(0)) >= masked
    wave = Wave.of(keep, [size] * NUM_GROUPS, device=device)
    x = random_tensor(size * NUM_GROUPS, hidden, **options)
    weight = random_tensor(heads * dim, hidden, scale=hidden**-0.5, seed=1, **options)
    angle = torch.outer(torch.arange(float(size)), 1e4 ** -torch.linspace(0, 1, dim // 2))
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    positions = torch.arange(size, device=device).repeat(NUM_GROUPS)
    arguments = (x, weight, cos, sin, positions)
    benchmark.group = f"kept_head_proj {shape} {len(x)} rows, {masked} masked"
    out = benchmark.pedantic(IMPLS[impl], args=(wave, *arguments), **repeats)
    num_kept = int(keep.sum()) * dim
    record_traffic(
        num_bytes=x.nbytes + weight.nbytes + size * num_kept * x.itemsize,
        num_flops=2 * size * num_kept * hidden,
        gemm=options["dtype"],
    )
    if impl != "dense":

        def reference(x, weight, cos, sin):
            rows = wave.rows.row_group
            return kept_head_proj_reference(
                *(x, weight, wave.keep, rows, None, None, cos, sin, positions),
                num_slots=wave.kept.width,
            )

        assert_within_baseline(out, reference, x, weight, cos, sin)
