"""compact_rows and compact_columns against PyTorch's index_select, on MLPs of real models."""

from __future__ import annotations

import pytest
import torch

from bonsai_fast import ops
from bonsai_fast.testing.cases import MODEL_SHAPES, random_tensor, synchronized_timer


def index_select(source, index, out, dim):
    torch.index_select(source, dim, index, out=out.narrow(dim, 0, len(index)))


def op(source, index, out, dim):
    (ops.compact_columns if dim else ops.compact_rows)(source, index, out)


IMPLS = {"index_select": index_select, "op": op}
SHAPES = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape, id=shape.name) for shape in MODEL_SHAPES),
]


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_compact(benchmark, record_traffic, repeats, device, shape, dim, impl):
    channels, hidden = (90, 48) if shape is None else (shape.intermediate_size, shape.hidden_size)
    sizes = (channels, hidden) if dim == 0 else (hidden, channels)
    source = random_tensor(*sizes, dtype=torch.bfloat16, device=device)
    keep = torch.rand(channels, generator=torch.Generator().manual_seed(0)) < 0.7
    index = keep.nonzero()[:, 0].to(device, torch.int32)
    out = torch.empty_like(source.narrow(dim, 0, len(index)), memory_format=torch.contiguous_format)
    benchmark.group = f"compact {list(sizes)} dim {dim}"
    benchmark.pedantic(IMPLS[impl], args=(source, index, out, dim), **repeats)
    record_traffic(num_bytes=2 * out.nbytes, num_flops=0)
    assert torch.equal(out, source.index_select(dim, index))
