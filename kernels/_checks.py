"""What each op accepts, checked alike by its launcher and its CPU path. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_token_nll(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless logits [N, V] and labels [N] are what `token_nll` takes."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, V] with V >= 1, got {list(logits.shape)}")
    if logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be float16, bfloat16 or float32, got {logits.dtype}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous along V, got strides {logits.stride()}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must be [{logits.shape[0]}], one a row of logits, got {list(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(
            f"labels must be on the device of logits, {logits.device}, got {labels.device}"
        )
