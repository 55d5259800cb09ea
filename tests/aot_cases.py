"""Launches that test_aot.py compiles: shapes of real models, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from aot import ARCHITECTURES

from bonsai_fast.testing import MODEL_SHAPES

LLAMA = next(shape for shape in MODEL_SHAPES if shape.name == "Llama-3-8B")
NUM_ROWS, NUM_GROUPS = 16384, 64


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        matrix: whether its first kernel multiplies matrices, on tensor cores.
    """

    name: str
    call: Callable[[], Any]
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    matrix: bool = True


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def token_nll(dtype: torch.dtype, vocab_size: int) -> Any:
    from bonsai_fast.kernels.token_nll import token_nll_triton

    return token_nll_triton(meta(64, vocab_size, dtype=dtype), meta(64, dtype=torch.int64))


def glu_mask(dtype: torch.dtype, activation: str = "silu") -> Any:
    from bonsai_fast.kernels.glu_mask import glu_mask_triton

    channels = LLAMA.intermediate_size
    return glu_mask_triton(
        meta(NUM_ROWS, 2 * channels, dtype=dtype),
        meta(NUM_GROUPS, channels, dtype=torch.bool),
        meta(NUM_ROWS, dtype=torch.int32),
        activation=activation,
        gated=True,
    )


CASES = [
    *(
        Case(f"token_nll-{dtype}-{size}", lambda d=dtype, v=size: token_nll(d, v), matrix=False)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for size in (128256, 50257)
    ),
    Case("glu_mask", lambda: glu_mask(torch.bfloat16), matrix=False),
]
