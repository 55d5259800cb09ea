"""column_moments against separate reductions, at the widths of real models."""

from __future__ import annotations

import torch
from op_comparison import WIDTHS, compare

from bonsai_fast import ops
from bonsai_fast.testing.cases import random_tensor
from bonsai_fast.testing.reference import column_moments_reference


def eager(x):
    """One pass over a float copy for every moment."""
    wide = x.float()
    sums = (wide.square().sum(0), wide.abs().sum(0), wide.sum(0))
    return (*(part.double() for part in sums), wide.abs().amax(0))


IMPLS = {"eager": eager, "op": ops.column_moments}
NUM_TOKENS = {"cpu": 1024, "cuda": 16384}


@compare(width=WIDTHS, impl=IMPLS)
def bench_column_moments(benchmark, record_traffic, repeats, device, width, impl):
    shape = (8, 90) if width is None else (NUM_TOKENS[device.type], width)
    x = random_tensor(*shape, dtype=torch.bfloat16, device=device)
    benchmark.group = f"column_moments {list(shape)}"
    moments = benchmark.pedantic(IMPLS[impl], args=(x,), **repeats)
    # A product, a magnitude, a maximum and three sums an element.
    record_traffic(num_bytes=x.nbytes, num_flops=6 * x.numel())
    for part, truth in zip(moments, column_moments_reference(x), strict=True):
        torch.testing.assert_close(part, truth, rtol=1e-4, atol=1e-4 * len(x) ** 0.5)
