"""Checks of an op's arguments: each raises ValueError with what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.kernels._sizes import INDEX_PADDING
from bonsai_fast.ops._groups import ACTIVATIONS

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_floats(name: str, tensor: Tensor, *dims: str) -> None:
    """The op's first tensor, which sets dtype and device: floats, contiguous along the last dim.

    Args:
        name: the argument's name, for the error.
        tensor: the argument.
        dims: the names of its dimensions.
    """
    if tensor.dim() != len(dims):
        raise ValueError(f"{name} must be [{', '.join(dims)}], got {list(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    check_last_dim(name, tensor)


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor, *shape: int | None
) -> None:
    """A tensor of this dtype and shape (None: any size) on the device of `like`, any strides."""
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


def check_rows(
    name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor, *shape: int | None
) -> None:
    """As `check_tensor`, and contiguous along the last dim."""
    check_tensor(name, tensor, dtype, like, *shape)
    check_last_dim(name, tensor)


def check_last_dim(name: str, tensor: Tensor) -> None:
    """Contiguous along the last dim: kernels read it without a stride."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous along its last dim, got strides {tensor.stride()}"
        )


def check_weight(name: str, weight: Tensor, x: Tensor, *shape: int | None) -> None:
    """A matrix in the dtype of `x`. Kernels address it by 32-bit offsets."""
    check_rows(name, weight, x.dtype, x, *shape)
    if weight.shape[0] * weight.stride(0) >= 1 << 31:
        raise ValueError(f"{name} must span fewer than 2^31 elements, got {list(weight.shape)}")


def check_plan(x: Tensor, index: Tensor, count: Tensor, tiles: Tensor, *, multiple: int) -> None:
    """The shapes of `KeptLists` and `RowPlan`, with `width` a multiple; values are trusted."""
    check_rows("index", index, torch.int32, x, None, None)
    width = index.shape[1] - INDEX_PADDING
    if width < 0 or width % multiple:
        raise ValueError(
            f"index must be [K, width + {INDEX_PADDING}], width a multiple of {multiple}, "
            f"got {list(index.shape)}"
        )
    check_rows("count", count, torch.int32, x, index.shape[0])
    check_tiles(tiles, x, 3)


def check_tiles(tiles: Tensor, x: Tensor, num_columns: int) -> None:
    """int32 [num_tiles, num_columns], contiguous."""
    check_rows("tiles", tiles, torch.int32, x, None, num_columns)
    if not tiles.is_contiguous():
        raise ValueError(f"tiles must be contiguous, got strides {tiles.stride()}")


def check_output_projection(
    a: Tensor, index: Tensor, count: Tensor, tiles: Tensor,
    bias: Tensor | None, residual: Tensor | None,
    *, num_outputs: int, multiple: int,
) -> None:  # fmt: skip
    """Tables as in `check_plan` for the slots of `a`; bias [N] and residual [T, N], or None."""
    check_plan(a, index, count, tiles, multiple=multiple)
    width = index.shape[1] - INDEX_PADDING
    if a.shape[1] != width:
        raise ValueError(f"a must have the index's {width} slots, got {a.shape[1]}")
    check_bias(bias, a, num_outputs)
    if residual is not None:
        check_rows("residual", residual, a.dtype, a, a.shape[0], num_outputs)


def check_bias(bias: Tensor | None, x: Tensor, size: int) -> None:
    """None, or [size] in the dtype of `x`."""
    if bias is not None:
        check_rows("bias", bias, x.dtype, x, size)


def check_softcap(softcap: float | None) -> None:
    """None, or positive."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")


def check_activation(activation: str) -> None:
    """One of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
