"""compact_rows and compact_columns against PyTorch's index_select, on MLPs of real models."""

from __future__ import annotations

import pytest
import torch
from op_comparison import SHAPES, compare

from bonsai_fast import ops
from bonsai_fast.testing.cases import random_tensor


def index_select(source, index, out, dim):
    torch.index_select(source, dim, index, out=out.narrow(dim, 0, len(index)))


def op(source, index, out, dim):
    (ops.compact_columns if dim else ops.compact_rows)(source, index, out)


IMPLS = {"index_select": index_select, "op": op}
DIMS = [pytest.param(0, id="rows"), pytest.param(1, id="columns")]


@compare(shape=SHAPES, dim=DIMS, impl=IMPLS)
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
