"""The C++ extension, called with tensors. On CUDA, PyTorch computes the same."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    import bonsai_fast._C as _C
except ModuleNotFoundError as error:
    # A checkout shadows an installed copy when Python starts in it.
    raise ImportError(
        f"the C++ extension bonsai_fast._C is not built in {__file__.rpartition('native.py')[0]}: "
        "run `pip install -e .` in the source tree, or start Python outside it to use an "
        "installed copy"
    ) from error

# Slicing copies bytes: each dtype is copied as an integer of its size, which NumPy knows.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
# Rows that a CUDA reduction converts to float64 at a time.
_BLOCK_ROWS = 1024


class ChannelMoments(NamedTuple):
    """Statistics of C channels over all tokens; `sum_of_squares / tokens` is the mean square."""

    sum_of_squares: Tensor  # (C,) float64
    sum_abs: Tensor  # (C,) float64
    sum: Tensor  # (C,) float64
    max_abs: Tensor  # (C,) float32


def take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Copy the kept rows (dim 0) or columns (dim 1) into a new contiguous tensor.

    Args:
        tensor: (N,), (N, M) or (E, N, M), any strides; on the CPU a dtype of 1, 2, 4 or 8 bytes.
        index: (K,) int64 on any device, strictly increasing positions along `dim`.
        dim: one of its dimensions.
    Returns:
        the same shape with K along `dim`, on `tensor`'s device with its dtype, detached from
        autograd.
    Raises:
        TypeError: `index` is not int64, or an element of `tensor` has another size.
        ValueError: wrong number of dimensions, or `index` is not strictly increasing.
        IndexError: a position is negative or too large.
    """
    if tensor.ndim not in (1, 2, 3) or dim not in range(tensor.ndim):
        raise ValueError(
            f"expected a tensor of 1, 2 or 3 dims and one of them, got shape {tuple(tensor.shape)} "
            f"and dim {dim}"
        )
    tensor = tensor.detach()
    if tensor.ndim == 3 and dim > 0:
        return torch.stack([take(matrix, index, dim - 1) for matrix in tensor])
    if tensor.ndim == 3:
        return take(tensor.flatten(1), index, 0).view(-1, *tensor.shape[1:])
    if tensor.device.type != "cpu":
        _check_index(index, tensor.shape[dim])
        return torch.index_select(tensor, dim, index.to(tensor.device))
    carrier = _CARRIERS.get(tensor.element_size())
    if carrier is None:
        raise TypeError(f"expected elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}")
    copy = _C.take_columns if dim else _C.take_rows
    kept = copy(
        tensor.view(carrier).numpy(),
        index.detach().cpu().numpy(),
        num_threads=torch.get_num_threads(),
    )
    return torch.from_numpy(kept).view(tensor.dtype)


def kept_lists(masks: Tensor, *, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """The kept units of each sub-model as lists of one length, for kernels that gather.

    Args:
        masks: bool [S, P], on any device.
        multiple: the length is the largest number kept, rounded up to a multiple of this.
    Returns:
        int32 [S, length], ascending positions, then zeros; int32 [S], the number of positions. Both
        on the CPU.
    Raises:
        TypeError, ValueError: `masks` is not bool [S, P], or `multiple` is not positive.
    """
    keep = masks.detach().cpu().contiguous().numpy()
    lists, counts = _C.kept_lists(keep, multiple=multiple, num_threads=torch.get_num_threads())
    return torch.from_numpy(lists), torch.from_numpy(counts)


def channel_moments(x: Tensor) -> ChannelMoments:
    """Sum of squares, magnitudes and values, and the largest magnitude, of each channel.

    Sums of 64 tokens are float32, sums of these are float64: errors are below 1e-6 of the sum of
    magnitudes. Results do not depend on the number of threads or the processor. NaN and Inf stay
    in their channel.

    Args:
        x: (..., C) float16 | bfloat16 | float32; all leading dims count as tokens.
    Returns:
        ChannelMoments on `x`'s device if that is the CPU or CUDA, else on the CPU; all zero without
        tokens.
    Raises:
        TypeError: `x` has another dtype.
        ValueError: `x` has fewer than two dimensions.
    """
    rows = _rows_of(x)
    if rows.device.type == "cuda":
        return _channel_moments_torch(rows)
    # Other devices may lack float64: their activations are copied to the CPU.
    moments = _C.column_moments(_storage_of(rows), **_options(rows))
    return ChannelMoments(*map(torch.from_numpy, moments))


def column_mean_abs(weight: Tensor) -> Tensor:
    """Mean magnitude of each input column, over the outputs.

    Args:
        weight: (out, in) float16 | bfloat16 | float32, out >= 1.
    Returns:
        (in,) float64 on `weight`'s device if that is the CPU or CUDA, else on the CPU.
    Raises:
        TypeError: `weight` has another dtype.
        ValueError: `weight` is not 2-D, or has no rows.
    """
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"expected (out, in) with at least one row, got shape {tuple(weight.shape)}"
        )
    return channel_moments(weight).sum_abs / len(weight)


def weight_norms(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """L1 and L2 norm of each column (dim 0) or row (dim 1) of a weight.

    Args:
        weight: (out, in) float16 | bfloat16 | float32.
        dim: the dimension that is summed over, as in `torch.linalg.vector_norm`.
    Returns:
        two (in,) or (out,) float64 tensors, on `weight`'s device if that is the CPU or CUDA, else
        on the CPU.
    Raises:
        TypeError: `weight` has another dtype.
        ValueError: `weight` is not 2-D, or `dim` is not one of its two.
    """
    if weight.ndim != 2 or dim not in (0, 1):
        raise ValueError(f"expected (out, in) and dim 0 or 1, got {tuple(weight.shape)}, dim {dim}")
    rows = _rows_of(weight)
    if rows.device.type == "cuda":
        moments = _channel_moments_torch(rows if dim == 0 else rows.T)
    else:
        sums = _C.column_moments if dim == 0 else _C.row_moments
        moments = ChannelMoments(*map(torch.from_numpy, sums(_storage_of(rows), **_options(rows))))
    return moments.sum_abs, moments.sum_of_squares.sqrt()


def wanda_scores(weight: Tensor, root_mean_square: Tensor) -> Tensor:
    """Score of each weight: |W[o, c]| * rms(a_c).

    Args:
        weight: (out, in) float16 | bfloat16 | float32.
        root_mean_square: (in,) of each input channel's activations; converted to float32.
    Returns:
        (out, in) float32, on `weight`'s device if that is the CPU or CUDA, else on the CPU.
    Raises:
        TypeError: `weight` has another dtype.
        ValueError: the shapes do not fit.
    Source: Sun et al., arXiv:2306.11695, equation 1, with the root mean square for the norm.
    """
    rows, scale = _rows_and_scale(weight, root_mean_square)
    if rows.device.type == "cuda":
        return rows.float().abs() * scale
    scores = _C.wanda_scores(_storage_of(rows), scale.numpy(), **_options(rows))
    return torch.from_numpy(scores)


def wanda_keep(weight: Tensor, root_mean_square: Tensor, *, n: int, m: int) -> Tensor:
    """Keep the n highest scores of every m neighbours in a row; of equal scores, the first.

    Args:
        weight: (out, in) float16 | bfloat16 | float32, finite.
        root_mean_square: (in,), as in `wanda_scores`.
        n, m: such as 2 of 4; m divides `in`, and m = in ranks whole rows.
    Returns:
        (out, in) bool, True = kept, on `weight`'s device if that is the CPU or CUDA, else on the
        CPU.
    Raises:
        TypeError: `weight` has another dtype.
        ValueError: the shapes or n and m do not fit, or a score is NaN.
    """
    rows, scale = _rows_and_scale(weight, root_mean_square)
    if rows.device.type == "cuda":
        return _keep_torch(rows.float().abs() * scale, n, m)
    keep = _C.wanda_keep(_storage_of(rows), scale.numpy(), n=n, m=m, **_options(rows))
    return torch.from_numpy(keep)


def _options(rows: Tensor) -> Any:
    return {"dtype": _FLOATS[rows.dtype], "num_threads": torch.get_num_threads()}


def _rows_and_scale(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if weight.ndim != 2 or scale.shape != weight.shape[1:]:
        raise ValueError(
            f"expected weight (out, in) and scale (in,), got shapes {tuple(weight.shape)} and "
            f"{tuple(scale.shape)}"
        )
    rows = _rows_of(weight)
    device = rows.device if rows.device.type == "cuda" else "cpu"
    return rows, scale.detach().to(device, torch.float32).contiguous()


def _keep_torch(scores: Tensor, n: int, m: int) -> Tensor:
    """The CUDA path. Tests compare the C++ extension with it."""
    if m < 1 or not 0 <= n <= m or scores.shape[1] % m:
        raise ValueError(
            f"expected 0 <= n <= m and m to divide {scores.shape[1]} columns, got {n} of {m}"
        )
    if bool(scores.isnan().any()):
        raise ValueError("a score is NaN: the weights or the activations are not finite")
    groups = scores.reshape(-1, m)
    order = groups.argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter_(1, order[:, :n], True).reshape(scores.shape)


def _rows_of(x: Tensor) -> Tensor:
    """`x` as (rows, C), with the elements of a row next to each other."""
    if x.dtype not in _FLOATS:
        raise TypeError(f"expected float16, bfloat16 or float32, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"expected at least two dimensions, got shape {tuple(x.shape)}")
    rows = x.detach().flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _storage_of(rows: Tensor) -> NDArray[Any]:
    """As a NumPy array. NumPy has no bfloat16: 16-bit floats are passed as their bits."""
    rows = rows.cpu()
    return np.asarray(rows if rows.dtype == torch.float32 else rows.view(torch.uint16))


def _channel_moments_torch(rows: Tensor) -> ChannelMoments:
    """The CUDA path, by blocks of rows: the float64 copy stays small."""
    squares, magnitudes, values = rows.new_zeros((3, rows.shape[1]), dtype=torch.float64)
    largest = rows.new_zeros(rows.shape[1], dtype=torch.float32)
    for first in range(0, len(rows), _BLOCK_ROWS):
        wide = rows[first : first + _BLOCK_ROWS].double()
        values += wide.sum(0)
        squares += wide.square().sum(0)
        magnitude = wide.abs_()
        magnitudes += magnitude.sum(0)
        largest = torch.maximum(largest, magnitude.amax(0).float())
    return ChannelMoments(squares, magnitudes, values, largest)


def _check_index(index: Tensor, size: int) -> None:
    """The same checks as in the C++ extension."""
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"index must be 1-D, got shape {tuple(index.shape)}")
    outside = index[(index < 0) | (index >= size)]
    if len(outside):
        raise IndexError(f"index holds {outside[0].item()}, but the dim has {size} positions")
    falls = (index[1:] <= index[:-1]).nonzero()
    if len(falls):
        at = int(falls[0])
        raise ValueError(
            f"index must be strictly increasing, but index[{at}] is {index[at].item()} "
            f"and index[{at + 1}] is {index[at + 1].item()}"
        )
