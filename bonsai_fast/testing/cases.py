"""Shared by tests/ and bench/: real model shapes, the error budget, the timer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bonsai_fast.ops import KeptLists, RowPlan

# Triton's interpreter does not support bfloat16: it holds such numbers as raw uint16.
KERNEL_DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# What a result may err beyond PyTorch's own error in the same dtype.
ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a published model, as its config.json gives them."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    def __str__(self) -> str:
        return self.name


MODEL_SHAPES = (
    ModelShape(
        name="SmolLM2-135M",
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
    ),
    ModelShape(
        name="Phi-2",
        hidden_size=2560,
        intermediate_size=10240,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=80,
        vocab_size=51200,
    ),
    ModelShape(
        name="Llama-2-7B",
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
    ),
    ModelShape(
        name="Llama-3-8B",
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
)


def random_logits(
    num_rows: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits [N, V] as spread as a trained model's, and labels int64 [N]; equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator).mul_(4).to(device, dtype)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator).to(device)
    return logits, labels


def random_tensor(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Normal numbers times `scale`, equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(scale).to(device, dtype)


def random_keep(num_groups: int, num_units: int, *, seed: int = 0) -> Tensor:
    """A keep mask, bool [K, N]: 70 % kept, none, all, a single one, and so on in turn."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(num_groups, num_units, generator=generator) < 0.7
    keep[1::4] = False
    keep[2::4] = True
    keep[3::4] = torch.arange(num_units) == num_units // 2
    return keep


@dataclass(frozen=True, eq=False)
class Wave:
    """Rows grouped by sub-model, and what those keep of one layer's units.

    Attributes:
        keep: bool [K, N].
        rows: the rows' plan.
        kept: `keep` as lists.
    """

    keep: Tensor
    rows: RowPlan
    kept: KeptLists

    @classmethod
    def of(
        cls,
        keep: Tensor,
        sizes: Sequence[int],
        *,
        multiple: int = 1,
        device: torch.device | str = "cpu",
    ) -> Wave:
        """The wave of sub-models with the given number of rows each."""
        kept = KeptLists.of(keep, multiple=multiple, device=device)
        return cls(keep.to(device), RowPlan.of(sizes, device=device), kept)

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """index, count and tiles, as ops take them one after another."""
        return self.kept.index, self.kept.count, self.rows.tiles


def random_wave(
    sizes: Sequence[int],
    num_units: int,
    *,
    multiple: int = 1,
    device: torch.device | str = "cpu",
) -> Wave:
    """Sub-models with the given number of rows each; masks as in `random_keep`."""
    keep = random_keep(len(sizes), num_units)
    return Wave.of(keep, sizes, multiple=multiple, device=device)


def assert_within_baseline(
    actual: Tensor, reference: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """Assert that `actual` errs no more than twice PyTorch's own error, plus ATOL of its dtype.

        |actual - truth| <= 2 max |baseline - truth| + ATOL
        truth = reference(inputs in float64), baseline = reference(inputs)

    Shape, dtype, NaN and infinities must be equal.
    """
    baseline = reference(*inputs)
    truth = reference(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert actual.dtype == baseline.dtype, f"dtype {actual.dtype}, expected {baseline.dtype}"
    errors = (baseline.double() - truth).abs()
    errors = errors[errors.isfinite()]
    budget = 2 * float(errors.max()) if errors.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), truth, rtol=0, atol=budget + ATOL[actual.dtype], equal_nan=True
    )


def synchronized_timer() -> float:
    """Seconds, once the GPU has finished its work; for `pytest.mark.benchmark(timer=...)`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
