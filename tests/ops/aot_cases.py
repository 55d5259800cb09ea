"""Launches that test_aot.py compiles: shapes of real models, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from aot import ARCHITECTURES
from op_paths import kernel_of

from bonsai_fast import ops
from bonsai_fast.kernels._sizes import BLOCK_ROWS, INDEX_PADDING
from bonsai_fast.testing.cases import MODEL_SHAPES

LLAMA = next(shape for shape in MODEL_SHAPES if shape.name == "Llama-3-8B")
NUM_ROWS, NUM_GROUPS = 16384, 64


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        matrix: whether its first kernel multiplies matrices, on tensor cores.
        scattered: whether it picks single elements, which no wide load can.
    """

    name: str
    call: Callable[[], Any]
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    matrix: bool = True
    scattered: bool = False


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def token_nll(dtype: torch.dtype, vocab_size: int = LLAMA.vocab_size) -> Any:
    return kernel_of(ops.token_nll)(meta(64, vocab_size, dtype=dtype), meta(64, dtype=torch.int64))


def glu_mask(dtype: torch.dtype, activation: str = "silu") -> Any:
    channels = LLAMA.intermediate_size
    return kernel_of(ops.glu_mask)(
        meta(NUM_ROWS, 2 * channels, dtype=dtype),
        meta(NUM_GROUPS, channels, dtype=torch.bool),
        meta(NUM_ROWS, dtype=torch.int32),
        activation=activation,
        gated=True,
    )


def plan(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """index, count and tiles of a wave."""
    index = meta(NUM_GROUPS, width + INDEX_PADDING, dtype=torch.int32)
    tiles = meta(NUM_ROWS // BLOCK_ROWS, 3, dtype=torch.int32)
    return index, meta(NUM_GROUPS, dtype=torch.int32), tiles


def kept_up_proj(dtype: torch.dtype, activation: str = "silu", gated: bool = True) -> Any:
    rows = LLAMA.intermediate_size * (2 if gated else 1)
    return kernel_of(ops.kept_up_proj)(
        meta(NUM_ROWS, LLAMA.hidden_size, dtype=dtype),
        meta(rows, LLAMA.hidden_size, dtype=dtype),
        *plan(10240),
        None if gated else meta(rows, dtype=dtype),
        activation=activation,
        gated=gated,
    )


def kept_down_proj(dtype: torch.dtype) -> Any:
    return kernel_of(ops.kept_down_proj)(
        meta(NUM_ROWS, 10240, dtype=dtype),
        meta(LLAMA.intermediate_size, LLAMA.hidden_size, dtype=dtype),
        *plan(10240),
        residual=meta(NUM_ROWS, LLAMA.hidden_size, dtype=dtype),
    )


def lm_head_nll(dtype: torch.dtype, softcap: float | None = None) -> Any:
    return kernel_of(ops.lm_head_nll)(
        meta(NUM_ROWS, LLAMA.hidden_size, dtype=dtype),
        meta(LLAMA.vocab_size, LLAMA.hidden_size, dtype=dtype),
        meta(NUM_ROWS, dtype=torch.int64),
        softcap=softcap,
    )


def kept_head_proj(dtype: torch.dtype, norm: bool = False, head_dim: int = 128) -> Any:
    table = meta(4096, head_dim // 2, dtype=torch.float32)
    return kernel_of(ops.kept_head_proj)(
        meta(NUM_ROWS, LLAMA.hidden_size, dtype=dtype),
        meta(LLAMA.num_attention_heads * head_dim, LLAMA.hidden_size, dtype=dtype),
        *plan(28),
        norm_weight=meta(head_dim, dtype=dtype) if norm else None,
        cos=table,
        sin=table,
        positions=meta(NUM_ROWS, dtype=torch.int64),
        head_dim=head_dim,
    )


def grouped_attention(dtype: torch.dtype, head_dim: int = 128, **options: Any) -> Any:
    kv = meta(NUM_ROWS, LLAMA.num_key_value_heads, head_dim, dtype=dtype)
    return kernel_of(ops.grouped_attention)(
        meta(NUM_ROWS, 28, head_dim, dtype=dtype),
        kv,
        kv,
        meta(NUM_GROUPS, dtype=torch.int32),
        meta(NUM_GROUPS, 28, dtype=torch.int32),
        meta(NUM_ROWS // BLOCK_ROWS, 4, dtype=torch.int32),
        scale=head_dim**-0.5,
        **options,
    )


def kept_o_proj(dtype: torch.dtype, head_dim: int = 128) -> Any:
    return kernel_of(ops.kept_o_proj)(
        meta(NUM_ROWS, 28, head_dim, dtype=dtype),
        meta(LLAMA.hidden_size, LLAMA.num_attention_heads * head_dim, dtype=dtype),
        *plan(28),
        residual=meta(NUM_ROWS, LLAMA.hidden_size, dtype=dtype),
    )


def column_moments(dtype: torch.dtype) -> Any:
    return kernel_of(ops.column_moments)(meta(NUM_ROWS, LLAMA.intermediate_size, dtype=dtype))


def compact(dim: int) -> Any:
    function = kernel_of(ops.compact_columns if dim else ops.compact_rows)
    source = meta(LLAMA.intermediate_size, LLAMA.intermediate_size)
    shape = [LLAMA.intermediate_size, LLAMA.intermediate_size]
    shape[dim] = 10240
    return function(source, meta(10000, dtype=torch.int32), meta(*shape))


BF16, FP32 = torch.bfloat16, torch.float32
GEMMA = {"softcap": 50.0, "window": 4096}
SM_86, SM_90 = ("sm_86",), ("sm_90",)
FP16, ODD = torch.float16, 50257

# The defaults in bfloat16 for every architecture; what else there is where it is tightest.
CASES = [
    Case("token_nll", lambda: token_nll(BF16), matrix=False),
    Case("token_nll-odd", lambda: token_nll(BF16, ODD), matrix=False),
    Case("token_nll-fp16", lambda: token_nll(FP16), SM_86, matrix=False),
    Case("token_nll-fp32", lambda: token_nll(FP32), SM_86, matrix=False),
    Case("token_nll-fp32-odd", lambda: token_nll(FP32, ODD), SM_86, matrix=False),
    Case("glu_mask", lambda: glu_mask(BF16), matrix=False),
    Case("kept_up_proj", lambda: kept_up_proj(BF16)),
    # The activation with the longest code, and a bias.
    Case("kept_up_proj-plain", lambda: kept_up_proj(BF16, "gelu", gated=False), SM_86),
    Case("kept_up_proj-fp32", lambda: kept_up_proj(FP32), SM_86),
    Case("kept_down_proj", lambda: kept_down_proj(BF16)),
    Case("lm_head_nll", lambda: lm_head_nll(BF16)),
    Case("lm_head_nll-softcap", lambda: lm_head_nll(BF16, 30.0), SM_86),
    Case("kept_head_proj", lambda: kept_head_proj(BF16)),
    Case("kept_head_proj-norm", lambda: kept_head_proj(BF16, norm=True), SM_86),
    Case("kept_head_proj-256", lambda: kept_head_proj(BF16, head_dim=256), SM_90),
    Case("kept_head_proj-fp32", lambda: kept_head_proj(FP32), SM_86),
    Case("grouped_attention", lambda: grouped_attention(BF16)),
    Case("grouped_attention-64", lambda: grouped_attention(BF16, 64), SM_86),
    Case("grouped_attention-80", lambda: grouped_attention(BF16, 80), SM_90),
    Case("grouped_attention-256", lambda: grouped_attention(BF16, 256, **GEMMA), SM_90),
    Case("grouped_attention-fp32", lambda: grouped_attention(FP32), SM_86),
    Case("kept_o_proj", lambda: kept_o_proj(BF16)),
    Case("kept_o_proj-80", lambda: kept_o_proj(BF16, 80), SM_90),
    Case("column_moments", lambda: column_moments(BF16), matrix=False),
    Case("compact_rows", lambda: compact(0), matrix=False),
    Case("compact_columns", lambda: compact(1), matrix=False, scattered=True),
]
