"""One layer's refit in closed form, beside what one would write without it.

Inputs of Llama-3-8B's `down_proj`, 14,336 channels, of which pruning keeps 80 %: the sums over a
block of tokens, and the solution of the normal equations for its 4,096 outputs, with time and peak
memory. A second shape is that of Llama-2-7B.
"""

from __future__ import annotations

import pytest
import torch

from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.recovery.closed_form.least_squares import (
    WeightedSums,
    best_correction,
)
from bonsai_fast.testing.cases import random_tensor

TOKENS = 1024
# tokens, kept channels, outputs
SHAPES = [
    pytest.param((256, 70, 24), id="smoke"),
    pytest.param((TOKENS, 8806, 4096), id="Llama 2, 7B"),
    pytest.param((TOKENS, 11469, 4096), id="Llama 3, 8B"),
]
# all channels: what an order of removal needs
GRAM_SHAPES = [*SHAPES, pytest.param((TOKENS, 14336, 4096), id="Llama 3, 8B, all channels")]
RIDGE = 0.3
RIDGES = (0.1, 0.3, 1.0, 3.0)


def case(shape, device, seed=0):
    """Inputs, residual and weights of tokens."""
    tokens, channels, outputs = shape
    inputs = random_tensor(tokens, channels, dtype=torch.bfloat16, device=device, seed=seed)
    residual = random_tensor(tokens, outputs, dtype=torch.bfloat16, device=device, seed=seed + 9)
    return inputs, residual, torch.rand(tokens, device=device) + 0.5


def by_blocks(inputs, residual, weights):
    """As recovery does: float32 sums, added block by block."""
    sums = WeightedSums(inputs.shape[1], residual.shape[1], inputs.device, with_bias=False)
    sums.add(inputs, residual, weights)
    found = sums.normal_equations()
    return found.gram_sums, found.cross_sums


def by_products(inputs, residual, weights):
    """All tokens at once."""
    wide = inputs.float() * weights.sqrt()[:, None]
    return wide.T @ wide, wide.T @ (residual.float() * weights.sqrt()[:, None])


def one_product(inputs, residual, weights):
    """Nothing but the matrix product, of inputs that are float32: the fastest that there is."""
    return inputs.T @ inputs, None


@pytest.fixture(scope="session")
def once(device, repeats):
    """Arguments of `benchmark.pedantic`: seconds on a CPU, so a single round."""
    single = {"rounds": 1, "iterations": 1, "warmup_rounds": 0}
    return repeats if device.type == "cuda" else single


def _mib(num_bytes):
    """Memory as text."""
    return "unknown memory" if num_bytes is None else f"{num_bytes / 2**20:,.0f} MiB"


SUMS = {"WeightedSums": by_blocks, "two products": by_products, "X.T @ X alone": one_product}


@pytest.mark.parametrize("impl", SUMS)
@pytest.mark.parametrize("shape", GRAM_SHAPES)
def bench_sums(benchmark, record_traffic, once, summarize, device, shape, impl):
    """Sums over tokens; a share of the rate of a large float32 matrix product in the same run."""
    tokens, channels, outputs = shape
    inputs, residual, weights = case(shape, device)
    given = inputs.float() if impl == "X.T @ X alone" else inputs
    with PeakMemory(device) as peak:
        gram, cross = SUMS[impl](given, residual, weights)
    if impl != "X.T @ X alone":
        expected = inputs[:, :8].double().T @ (weights.double()[:, None] * inputs.double())
        torch.testing.assert_close(gram[:8].double(), expected, rtol=1e-4, atol=1e-2)
        expected = inputs[:, :8].double().T @ (weights.double()[:, None] * residual.double())
        torch.testing.assert_close(cross[:8].double(), expected, rtol=1e-4, atol=1e-2)
    del gram, cross
    benchmark.group = f"sums of {shape}, {torch.get_num_threads()} threads"
    benchmark.pedantic(SUMS[impl], args=(given, residual, weights), **once)
    width = channels + (0 if impl == "X.T @ X alone" else outputs)
    record_traffic(
        num_bytes=given.nbytes + 4 * channels * width,
        num_flops=2 * tokens * channels * width,
        gemm=torch.float32,
    )
    benchmark.extra_info["peak_bytes"] = peak.bytes
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["tokens_per_s"] = tokens / seconds
        share = benchmark.extra_info["percent_of_gemm"]
        cell = f"{tokens / seconds:,.0f} tokens/s, {share:.0f} % of a product, {_mib(peak.bytes)}"
        summarize("sums over tokens, and peak memory", str(shape), impl, cell)


def equations_of(shape, device, seed):
    """Normal equations of a layer on tokens that do not determine it."""
    _, channels, outputs = shape
    sums = WeightedSums(channels, outputs, device, with_bias=False)
    sums.add(*case(shape, device, seed))
    return sums.normal_equations()


def by_cholesky(equations):
    """As recovery does, with one ridge."""
    return equations.solve(RIDGE).weight.T


def by_solve(equations):
    """LU factors, which know nothing of symmetry."""
    gram = equations.gram()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * eye, equations.cross())


SOLVERS = {"solve": by_cholesky, "torch.linalg.solve": by_solve}


@pytest.mark.parametrize("impl", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_solve(benchmark, record_traffic, once, summarize, device, shape, impl):
    """The correction of a layer for one ridge, in float64."""
    equations = equations_of(shape, device, 0)
    _, channels, outputs = shape
    benchmark.group = f"solution of {shape}, {torch.get_num_threads()} threads"
    with PeakMemory(device) as peak:
        found = benchmark.pedantic(SOLVERS[impl], args=(equations,), **once)
    some, size = slice(8), float(equations.gram().diagonal().mean())
    wanted = equations.cross(some)
    residual = equations.gram(some) @ found + RIDGE * size * found[some] - wanted
    # float32 sums are symmetric to rounding only
    assert float(residual.abs().max()) < 1e-6 * float(wanted.abs().max())
    record_traffic(
        num_bytes=equations.gram_sums.nbytes + 2 * equations.cross_sums.nbytes,
        num_flops=channels**3 // 3 + 2 * channels**2 * outputs,
        gemm=torch.float64,
    )
    benchmark.extra_info["peak_bytes"] = peak.bytes
    if benchmark.stats is not None:
        cell = f"{benchmark.stats.stats.median:,.1f} s, {_mib(peak.bytes)}"
        summarize("solution for one ridge, and peak memory", str(shape), impl, cell)


def refit(fitted, others):
    """All of a layer's refit: sums over two texts, and the ridge that serves the second best."""
    sums = [
        WeightedSums(part[0].shape[1], part[1].shape[1], part[0].device, with_bias=False)
        for part in (fitted, others)
    ]
    for each, part in zip(sums, (fitted, others), strict=True):
        each.add(*part)
    equations, choosing = (each.normal_equations() for each in sums)
    best = best_correction(equations, choosing, RIDGES)
    return choosing.error(None), choosing.error(best)


@pytest.mark.parametrize("shape", SHAPES)
def bench_refit(benchmark, once, summarize, device, shape):
    """Time and peak memory of one projection, four ridges tried."""
    parts = [case(shape, device, seed) for seed in (0, 1)]
    weight = torch.randn(shape[2], shape[1], generator=torch.Generator().manual_seed(2))
    for inputs, residual, _ in parts:  # what one layer can explain, and noise
        residual.add_((inputs.float() @ weight.to(device).T).to(residual.dtype))
    benchmark.group = f"refit of {shape}, {torch.get_num_threads()} threads"
    with PeakMemory(device) as peak:
        before, after = benchmark.pedantic(refit, args=tuple(parts), **once)
    assert after < before
    benchmark.extra_info["peak_bytes"] = peak.bytes
    if benchmark.stats is not None:
        cell = f"{benchmark.stats.stats.median:,.1f} s, {_mib(peak.bytes)}"
        summarize("refit of one projection, four ridges", str(shape), "refit", cell)
