"""What each op accepts, checked alike by its launcher and its CPU path. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of one tile, which every kernel over grouped rows shares: plans are made without Triton.
BLOCK_ROWS = 128
# What kernels may read past a list of kept units: a tile's worth, which they fetch ahead.
INDEX_PADDING = 128

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


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


def check_glu_mask(
    gate_up: Tensor, keep: Tensor, row_group: Tensor, activation: str, gated: bool
) -> None:
    """Raise ValueError unless the arguments are what `glu_mask` takes."""
    _check_activation(activation)
    _check_floats("gate_up", gate_up, "T", "2I" if gated else "I")
    num_channels = gate_up.shape[1] // 2 if gated else gate_up.shape[1]
    if gated and gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2I], gate then up, got {list(gate_up.shape)}")
    _check("keep", keep, torch.bool, gate_up, None, num_channels)
    _check("row_group", row_group, torch.int32, gate_up, len(gate_up))


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _check_floats(name: str, tensor: Tensor, *dims: str) -> None:
    """A float tensor whose last dim is contiguous: the one that sets dtype and device."""
    if tensor.dim() != len(dims):
        raise ValueError(f"{name} must be [{', '.join(dims)}], got {list(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    _check_last_dim(name, tensor)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor, *shape: int | None) -> None:
    """A tensor of this dtype and shape (None: any size), on the device of `like`."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
    sizes = [
        actual if size is None else size for size, actual in zip(shape, tensor.shape, strict=False)
    ]
    if tensor.dim() != len(shape) or list(tensor.shape) != sizes:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{expected}], got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    _check_last_dim(name, tensor)


def _check_last_dim(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous along its last dim, got strides {tensor.stride()}"
        )
