"""Types of the C++ extension; bonsai_fast.native is its only caller."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_Storage = Literal["float32", "float16", "bfloat16"]
_Float64 = NDArray[np.float64]

def take_rows(
    source: NDArray[Any],
    index: NDArray[np.int64],
    *,
    out: NDArray[Any] | None = None,
    num_threads: int = 1,
) -> NDArray[Any]: ...
def take_columns(
    source: NDArray[Any],
    index: NDArray[np.int64],
    *,
    out: NDArray[Any] | None = None,
    num_threads: int = 1,
) -> NDArray[Any]: ...
def channel_moments(
    x: NDArray[np.float32] | NDArray[np.uint16],
    *,
    dtype: _Storage = "float32",
    num_threads: int = 1,
) -> tuple[_Float64, _Float64, _Float64, NDArray[np.float32]]: ...
def column_mean_abs(
    weight: NDArray[np.float32] | NDArray[np.uint16],
    *,
    dtype: _Storage = "float32",
    num_threads: int = 1,
) -> _Float64: ...
