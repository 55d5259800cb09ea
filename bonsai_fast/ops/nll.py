"""Negative log-likelihoods: of logits, and of hidden states without their logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.kernels._checks import check_token_nll

# Logits upcast at a time by one thread: 1 MiB in float32, so that a block stays in a core's cache.
BLOCK_LOGITS = 1 << 18


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
