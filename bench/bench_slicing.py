"""native.take against PyTorch's ways to slice, and against memcpy of the kept bytes.

Weights of Llama-2-7B's layers, 5, 30 and 50 % removed, at random or in clusters. `memcpy` is the
ceiling: it reads only kept bytes. Each round writes to new memory, as surgery does, or always to
the same (`out`), as a loop over a checkpoint may.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bonsai_fast import _C
from bonsai_fast.ops import native

# (rows, columns), dimension that is sliced, rows or columns per unit
WEIGHTS = {
    "q_proj": ((4096, 4096), 0, 128),
    "o_proj": ((4096, 4096), 1, 128),
    "up_proj": ((11008, 4096), 0, 1),
    "down_proj": ((4096, 11008), 1, 1),
}
CLUSTER = 64


def kept_positions(size: int, unit: int, removed: float, clustered: bool) -> torch.Tensor:
    """Sorted kept positions: single units are removed, or runs of neighbours."""
    group = unit * (CLUSTER if clustered and unit == 1 else 1)
    order = np.random.default_rng(0).permutation(size // group)
    if clustered and unit > 1:
        order = np.arange(size // group)[::-1]
    gone = order[: round(removed * len(order))]
    keep = np.ones(size, dtype=bool)
    keep[(gone[:, None] * group + np.arange(group)).ravel()] = False
    return torch.from_numpy(keep.nonzero()[0])


def take_into(tensor, index, dim, out, kept):
    copy = _C.take_columns if dim else _C.take_rows
    source, target = tensor.view(torch.int16).numpy(), out.view(torch.int16).numpy()
    copy(source, index.numpy(), out=target, num_threads=torch.get_num_threads())
    return out


IMPLS = {
    "memcpy out": lambda tensor, index, dim, out, kept: out.copy_(kept),
    "take": lambda tensor, index, dim, out, kept: native.take(tensor, index, dim),
    "take out": take_into,
    "index_select": lambda tensor, index, dim, out, kept: tensor.index_select(dim, index),
    "index_select out": lambda tensor, index, dim, out, kept: torch.index_select(
        tensor, dim, index, out=out
    ),
    "boolean mask": lambda tensor, index, dim, out, kept: by_mask(tensor, index, dim),
}
CASES = [
    pytest.param(None, 0.3, False, id="smoke"),
    *(
        pytest.param(name, removed, clustered, id=f"{name}-{removed:.0%}-{how}")
        for name in WEIGHTS
        for removed, clustered, how in (
            (0.05, False, "random"),
            (0.3, False, "random"),
            (0.5, False, "random"),
            (0.3, True, "clustered"),
        )
    ),
]


def by_mask(tensor, index, dim):
    mask = torch.zeros(tensor.shape[dim], dtype=torch.bool)
    mask[index] = True
    return tensor[:, mask] if dim else tensor[mask]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "removed", "clustered"), CASES)
def bench_slicing(benchmark, record_traffic, repeats, impl, name, removed, clustered):
    shape, dim, unit = ((24, 40), 1, 1) if name is None else WEIGHTS[name]
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = kept_positions(shape[dim], unit, removed, clustered)
    expected = tensor.index_select(dim, index)
    arguments = (tensor, index, dim, torch.zeros_like(expected), expected)
    how = "clustered" if clustered else "random"
    benchmark.group = f"{name} {removed:.0%} removed, {how}, {torch.get_num_threads()} threads"
    result = benchmark.pedantic(IMPLS[impl], args=arguments, **repeats)
    record_traffic(num_bytes=2 * expected.nbytes, num_flops=0)
    assert torch.equal(result, expected)
