"""Types of the C++ extension; bonsai_fast.native is its only caller."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_Storage = Literal["float32", "float16", "bfloat16"]
_Isa = Literal["best", "portable", "avx2", "avx512"]
_Matrix = NDArray[np.float32] | NDArray[np.uint16]
_Float64 = NDArray[np.float64]
_Moments = tuple[_Float64, _Float64, _Float64, NDArray[np.float32]]

def instruction_sets() -> list[Literal["portable", "avx2", "avx512"]]: ...
def kept_lists(
    keep: NDArray[np.bool_], *, multiple: int = 1, num_threads: int = 1
) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
def take_rows(
    source: NDArray[Any],
    index: NDArray[np.int64],
    *,
    out: NDArray[Any] | None = None,
    num_threads: int = 1,
    isa: _Isa = "best",
) -> NDArray[Any]: ...
def take_columns(
    source: NDArray[Any],
    index: NDArray[np.int64],
    *,
    out: NDArray[Any] | None = None,
    num_threads: int = 1,
    isa: _Isa = "best",
) -> NDArray[Any]: ...
def column_moments(
    x: _Matrix, *, dtype: _Storage = "float32", num_threads: int = 1, isa: _Isa = "best"
) -> _Moments: ...
def row_moments(
    x: _Matrix, *, dtype: _Storage = "float32", num_threads: int = 1, isa: _Isa = "best"
) -> _Moments: ...
def wanda_scores(
    weight: _Matrix,
    scale: NDArray[np.float32],
    *,
    dtype: _Storage = "float32",
    num_threads: int = 1,
) -> NDArray[np.float32]: ...
def wanda_keep(
    weight: _Matrix,
    scale: NDArray[np.float32],
    *,
    n: int,
    m: int,
    dtype: _Storage = "float32",
    num_threads: int = 1,
) -> NDArray[np.bool_]: ...
