"""Matrix products of an MLP: the cost of widths that are no multiple of 128.

Up (width x hidden) and down (hidden x width) projections of half a layer: a width that is a
multiple of 128, nearby widths that are multiples of less, the whole layer, and on CUDA the whole
layer 2:4. They are timed alternately. Each round uses more copies of the weight than a cache holds,
as the layers of a model do.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from torch.nn import functional as F

from bonsai_fast.latency.semi_structured import BACKENDS, use_semi_structured, why_not
from bonsai_fast.ops.native import wanda_keep
from bonsai_fast.testing.cases import MODEL_SHAPES, random_tensor, synchronized_timer

ROUNDS = 7
# More than a last-level cache holds.
COLD_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
# A few copies of the smoke case's weights: their times mean nothing.
SMOKE_BYTES = 1 << 18
# Multiples, and how far below the round width they are taken.
BELOW = {64: 64, 32: 32, 16: 16, 8: 8, 4: 4, 2: 2, 1: 1}
TOKENS = {"cpu": (1, 128), "cuda": (1, 32, 4096)}
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def widths_of(full: int) -> dict[str, int]:
    """Label -> width: the full width, half of it as a multiple of 128, and widths just below."""
    half = full // 2 // 128 * 128 or full // 2
    labels = {"all": full, "half, multiple of 128": half}
    return labels | {
        f"half, multiple of {multiple}": half - below
        for multiple, below in BELOW.items()
        if below < half
    }


class Product:
    """x W^T, cycling through copies of one weight."""

    def __init__(
        self, weight: torch.Tensor, num_tokens: int, cold_bytes: int, backend: str | None = None
    ) -> None:
        self.dense = weight
        self.num_bytes = weight.nbytes
        self.x = random_tensor(
            num_tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, seed=1
        )
        copies = -(-cold_bytes // weight.nbytes)
        linears = []
        for _ in range(copies):
            linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            if backend is not None:
                use_semi_structured(linear, backend)
            linears.append(linear)
        self.weights = [linear.weight for linear in linears]
        self.seconds: list[float] = []

    @torch.inference_mode()
    def round(self) -> None:
        """Time one product, as the mean over all copies."""
        start = synchronized_timer()
        for weight in self.weights:
            self.out = F.linear(self.x, weight)
        self.seconds.append((synchronized_timer() - start) / len(self.weights))

    def check(self) -> None:
        """Assert that the last product is right."""
        expected = self.x.float() @ self.dense.float().T
        error = (self.out.float() - expected).abs().max()
        assert float(error) <= ERROR[self.dense.dtype] * float(expected.abs().max())

    @property
    def median(self) -> float:
        """Seconds for one product."""
        return statistics.median(self.seconds)

    @property
    def num_flops(self) -> int:
        """FLOPs of one product, with those of zeros."""
        return 2 * len(self.x) * self.dense.numel()


def make_products(
    hidden: int,
    full: int,
    down: bool,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    cold_bytes: int,
) -> dict[str, Product]:
    """Label -> product."""
    products = {}
    whole = random_tensor(full, hidden, dtype=dtype, device=device, scale=hidden**-0.5)
    for label, width in widths_of(full).items():
        weight = whole[:width].T if down else whole[:width]
        products[label] = Product(weight.contiguous(), num_tokens, cold_bytes)
    for backend in BACKENDS:
        if why_not(backend, device, dtype) is None:
            weight = products["all"].dense
            scale = torch.ones(weight.shape[1], device=device)
            zeros = weight * wanda_keep(weight, scale, n=2, m=4)
            products[f"all, 2:4 by {backend}"] = Product(zeros, num_tokens, cold_bytes, backend)
    return products


TIMED = [shape for shape in MODEL_SHAPES if shape.name in ("SmolLM2-135M", "Llama-2-7B")]
CASES = [
    pytest.param(None, 3, id="smoke"),
    *(
        pytest.param(shape, num_tokens, id=f"{shape}-{num_tokens}")
        for shape in TIMED
        for num_tokens in TOKENS["cuda" if torch.cuda.is_available() else "cpu"]
    ),
]


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize(("shape", "num_tokens"), CASES)
def bench_layers(
    benchmark, summarize, stream_gb_per_s, gemm_gflop_per_s, device, shape, num_tokens, down
):
    hidden, full = (48, 512) if shape is None else (shape.hidden_size, shape.intermediate_size)
    dtype = torch.float32 if shape is None else torch.bfloat16
    cold_bytes = SMOKE_BYTES if shape is None else COLD_BYTES[device.type]
    products = make_products(hidden, full, down, num_tokens, device, dtype, cold_bytes)

    def all_in_turns() -> None:
        for product in products.values():
            product.round()

    kind = "down" if down else "up"
    benchmark.group = f"{kind} projections of {shape or 'smoke'}, {num_tokens} tokens, in turns"
    all_in_turns()
    for product in products.values():
        product.seconds.clear()
    benchmark.pedantic(all_in_turns, rounds=1 if shape is None else ROUNDS)
    peak = gemm_gflop_per_s(dtype)
    dense, half = products["all"], products["half, multiple of 128"]
    for label, product in products.items():
        product.check()
        width = product.dense.shape[1 if down else 0]
        per_column = (product.median / width) / (half.median / half.dense.shape[1 if down else 0])
        flops, num_bytes = product.num_flops / product.median, product.num_bytes / product.median
        benchmark.extra_info[label] = {
            "width": width,
            "seconds": product.median,
            "bytes": product.num_bytes,
            "flops": product.num_flops,
            "percent_of_stream": 100 * num_bytes / 1e9 / stream_gb_per_s,
            "percent_of_gemm": 100 * flops / 1e9 / peak,
            "times_dense": dense.median / product.median,
            "column_over_multiple_of_128": per_column,
        }
        table = f"{shape or 'smoke'} {kind}: times all (a column's cost over multiple of 128)"
        text = f"{dense.median / product.median:.2f} ({per_column:.2f})"
        summarize(table, f"{label}: {width}", f"{num_tokens} tokens", text)
