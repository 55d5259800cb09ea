"""What kernels over grouped rows share: the tile of a program, products, activations, stores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# float32 operands are multiplied as three TF32 products, which keep nearly all of float32's digits.
# Products of 16-bit operands are exact with any setting.
PRECISION = tl.constexpr("tf32x3")
# This many row tiles use the same weights one after another: the weights stay in the L2 cache.
ROW_TILES_ABREAST = tl.constexpr(8)
# Running maxima start at a finite number: with -inf, all -inf would give -inf - (-inf) = NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def row_tile(tiles_ptr, num_tiles, num_columns):
    """This program's sub-model, first row, one past its last row, and column tile."""
    pid = tl.program_id(0)
    band = ROW_TILES_ABREAST * num_columns
    first = pid // band * ROW_TILES_ABREAST
    height = tl.minimum(num_tiles - first, ROW_TILES_ABREAST)
    tile = first + pid % band % height
    column = pid % band // height
    entry = tiles_ptr + tile.to(tl.int64) * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), column


@triton.jit
def multiply(
    acc, x_base, x_offs, weight_base, weight_offs,
    stop, num_terms, offs_k, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x @ weight over `num_terms` columns of x, or over none where `stop` is 0.

    Without EVEN_K the last step, of fewer than BLOCK_K columns, is masked.
    """
    for k in range(0, stop, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_base + x_offs)
            weight = tl.load(weight_base + weight_offs)
        else:
            inside = offs_k < num_terms - k
            x = tl.load(x_base + x_offs, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_base + weight_offs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_base += BLOCK_K
        weight_base += BLOCK_K
    return acc


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation of float32 numbers, NaN and infinities as in PyTorch."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def tanh(x):
    """The hyperbolic tangent, to 1e-7 absolutely."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def add_and_store(
    acc, bias_ptr, residual_ptr, out_ptr,
    begin, end, offs_n, num_outputs,
    stride_rt, stride_ot,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out = residual + bias + acc in float32, for one tile of rows and output columns."""
    offs_t = tl.arange(0, BLOCK_T)
    inside = (offs_t < end - begin)[:, None] & (offs_n < num_outputs)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < num_outputs, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        offs = offs_t[:, None] * stride_rt + offs_n[None, :]
        residual = residual_ptr + begin.to(tl.int64) * stride_rt + offs
        acc += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + begin.to(tl.int64) * stride_ot + offs_t[:, None] * stride_ot + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
