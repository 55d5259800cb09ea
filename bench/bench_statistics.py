"""Statistics of activations and weights against PyTorch, and against reading the same bytes once.

Inputs of Llama-2-7B's `down_proj`, and its weight.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bonsai_fast.ops import native

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    pytest.param((37, 70), id="smoke"),
    pytest.param((4096, 11008), id="down_proj"),
]


def read(x):
    """The fastest NumPy operation that reads every byte: a lower bound."""
    words = x.view(torch.uint8).flatten()
    return np.bitwise_xor.reduce(words[: len(words) // 8 * 8].numpy().view(np.uint64))


def by_torch(x):
    """All four statistics in float32, written in PyTorch."""
    wide = x.float()
    size = wide.abs()
    return wide.pow(2).sum(0), size.sum(0), wide.sum(0), size.amax(0)


def wanda_by_torch(weight, scale):
    """Wanda's 2:4 mask, written in PyTorch."""
    groups = (weight.float().abs() * scale).view(-1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter_(1, groups.topk(2, dim=1).indices, True).view(weight.shape)


CHANNELS = {
    "read": read,
    "channel_moments": native.channel_moments,
    "pow(2).sum(0)": lambda x: (x.float().pow(2).sum(0),),
    "torch, all four": by_torch,
}
NORMS = {
    "read": read,
    "weight_norms": lambda x: native.weight_norms(x, 1),
    "torch": lambda x: (x.float().norm(p=1, dim=1), x.float().norm(dim=1)),
}
SELECTION = {
    "wanda_keep": lambda weight, scale: native.wanda_keep(weight, scale, n=2, m=4),
    "topk": wanda_by_torch,
}


@pytest.mark.parametrize("impl", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def bench_channel_moments(benchmark, record_traffic, repeats, shape, dtype, impl):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    benchmark.group = f"moments of channels {shape} {dtype}, {torch.get_num_threads()} threads"
    result = benchmark.pedantic(CHANNELS[impl], args=(x,), **repeats)
    record_traffic(num_bytes=x.nbytes, num_flops=5 * x.numel())
    if impl != "read":
        expected = x.double().square().sum(0)
        torch.testing.assert_close(result[0].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def bench_row_norms(benchmark, record_traffic, repeats, shape, dtype, impl):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    benchmark.group = f"norms of rows {shape} {dtype}, {torch.get_num_threads()} threads"
    result = benchmark.pedantic(NORMS[impl], args=(x,), **repeats)
    record_traffic(num_bytes=x.nbytes, num_flops=3 * x.numel())
    if impl != "read":
        expected = x.double().norm(dim=1)
        torch.testing.assert_close(result[1].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", SELECTION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [pytest.param((8, 12), id="smoke"), *SHAPES[1:]])
def bench_wanda_2_of_4(benchmark, record_traffic, repeats, shape, dtype, impl):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.rand(shape[1])
    benchmark.group = f"Wanda 2:4 of {shape} {dtype}, {torch.get_num_threads()} threads"
    keep = benchmark.pedantic(SELECTION[impl], args=(weight, scale), **repeats)
    record_traffic(num_bytes=weight.nbytes + keep.nbytes, num_flops=weight.numel())
    assert (keep.view(-1, 4).sum(1) == 2).all()
