"""Negative log-likelihoods: of logits, and of hidden states without their logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.kernels._checks import check_lm_head_nll, check_token_nll

# Logits upcast at a time by one thread: 1 MiB in float32, so that a block stays in a core's cache.
BLOCK_LOGITS = 1 << 18
# Rows that amortise one reading of the LM head.
MIN_BLOCK_ROWS = 256


@torch.library.custom_op("bonsai_fast::token_nll", mutates_args=())
def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of one token per row, in float32 without a float copy of the logits.

        nll[n] = log sum_v exp(logits[n, v]) - logits[n, labels[n]]

    Rows do not depend on each other: NaN stays in its row. Infinities mean what they mean to
    `torch.nn.functional.cross_entropy`: -inf is a token that cannot occur (a label there gives
    +inf), and a row that holds +inf, or nothing but -inf, gives NaN.

    Args:
        logits: [N, V] float16, bfloat16 or float32, contiguous along V; rows may be strided.
        labels: [N] int64 in 0..V-1, on the same device.

    Returns:
        [N] float32, in nats.

    Raises:
        ValueError: a shape, dtype, stride or device is none of these, or a label is out of range
            (on CUDA, where to look would stall the stream, such a label gives NaN in its row).
    """
    check_token_nll(logits, labels)
    num_rows, vocab_size = logits.shape
    nll = logits.new_empty(num_rows, dtype=torch.float32)
    if num_rows == 0:
        return nll
    lowest, highest = (int(bound) for bound in labels.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"labels must lie in 0..{vocab_size - 1}, got {lowest}..{highest}")
    # A multiple of the threads, because log_softmax hands each thread whole rows.
    num_block_rows = torch.get_num_threads() * max(1, BLOCK_LOGITS // vocab_size)
    for begin in range(0, num_rows, num_block_rows):
        rows = slice(begin, begin + num_block_rows)
        nll[rows] = F.cross_entropy(logits[rows].float(), labels[rows], reduction="none")
    return nll


@token_nll.register_kernel("cuda")
def _token_nll_cuda(logits: Tensor, labels: Tensor) -> Tensor:
    # Imported here so that an install without Triton works on the CPU.
    from bonsai_fast.kernels.token_nll import token_nll_triton

    return token_nll_triton(logits, labels)


@token_nll.register_fake
def _token_nll_fake(logits: Tensor, labels: Tensor) -> Tensor:
    check_token_nll(logits, labels)
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("bonsai_fast::lm_head_nll", mutates_args=())
def lm_head_nll(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Negative log-likelihood of one token per row, from hidden states: no [T, V] tensor exists.

        z = scale * (x @ W.T + bias);  with a softcap, z = softcap * tanh(z / softcap)
        nll[t] = log sum_v exp(z[t, v]) - z[t, labels[t]]

    Rows do not depend on each other, and results are the same from run to run. Infinities are as in
    `token_nll`.

    Args:
        x: [T, H] float16, bfloat16 or float32, last hidden states after the final norm.
        weight: [V, H] in the dtype of `x`.
        labels: [T] int64 in 0..V-1.
        bias: [V] in the dtype of `x`.
        scale: factor of the logits.
        softcap: bound of the logits (Gemma 2), positive.

    Returns:
        [T] float32, in nats. On CUDA logits are float32 throughout; the CPU path rounds them to the
        dtype of `x`, as the model does.

    Raises:
        ValueError: an argument is none of these, or a label is out of range (on CUDA, where to look
            would stall the stream, such a label gives NaN in its row).
    """
    check_lm_head_nll(x, weight, labels, bias, softcap)
    nll = x.new_empty(len(x), dtype=torch.float32)
    # Few enough logits for the cache would be too few rows for the matrix product.
    num_block_rows = max(MIN_BLOCK_ROWS, BLOCK_LOGITS * torch.get_num_threads() // len(weight))
    for begin in range(0, len(x), num_block_rows):
        rows = slice(begin, begin + num_block_rows)
        logits = F.linear(x[rows], weight, bias)
        if scale != 1.0:
            logits *= scale
        if softcap is not None:
            logits = logits.float().div_(softcap).tanh_().mul_(softcap)
        nll[rows] = token_nll(logits, labels[rows])
    return nll


@lm_head_nll.register_kernel("cuda")
def _lm_head_nll_cuda(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    from bonsai_fast.kernels.lm_head_nll import lm_head_nll_triton

    return lm_head_nll_triton(x, weight, labels, bias, scale=scale, softcap=softcap)


@lm_head_nll.register_fake
def _lm_head_nll_fake(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    check_lm_head_nll(x, weight, labels, bias, softcap)
    return x.new_empty(x.shape[0], dtype=torch.float32)
