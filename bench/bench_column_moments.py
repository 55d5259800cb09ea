"""column_moments against separate reductions, at the widths of real models."""

from __future__ import annotations

import pytest
import torch

from bonsai_fast import ops
from bonsai_fast.testing.cases import MODEL_SHAPES, random_tensor, synchronized_timer
from bonsai_fast.testing.reference import column_moments_reference


def eager(x):
    """One pass over a float copy for every moment."""
    wide = x.float()
    sums = (wide.square().sum(0), wide.abs().sum(0), wide.sum(0))
    return (*(part.double() for part in sums), wide.abs().amax(0))


IMPLS = {"eager": eager, "op": ops.column_moments}
NUM_TOKENS = {"cpu": 1024, "cuda": 16384}
WIDTHS = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape.intermediate_size, id=shape.name) for shape in MODEL_SHAPES),
]


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", WIDTHS)
def bench_column_moments(benchmark, record_traffic, repeats, device, width, impl):
    shape = (8, 90) if width is None else (NUM_TOKENS[device.type], width)
    x = random_tensor(*shape, dtype=torch.bfloat16, device=device)
    benchmark.group = f"column_moments {list(shape)}"
    moments = benchmark.pedantic(IMPLS[impl], args=(x,), **repeats)
    # A product, a magnitude, a maximum and three sums an element.
    record_traffic(num_bytes=x.nbytes, num_flops=6 * x.numel())
    for part, truth in zip(moments, column_moments_reference(x), strict=True):
        torch.testing.assert_close(part, truth, rtol=1e-4, atol=1e-4 * len(x) ** 0.5)
