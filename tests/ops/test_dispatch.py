"""Every op's CUDA path, run by Triton's interpreter where there is no GPU, equals its CPU path."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

from bonsai_fast import ops
from bonsai_fast.testing.cases import random_logits, random_tensor, random_wave

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

ALL = {name: getattr(ops, name) for name in ops.__all__ if name.islower()}
WAVE = random_wave([3, 1, 2, 4], 6, multiple=128)
HEADS = random_wave([3, 1, 2, 4], 6)
X, RESIDUAL = random_tensor(10, 40), random_tensor(10, 40, seed=1)
LABELS = random_logits(10, 50)[1]
INDEX = torch.tensor([1, 4, 5], dtype=torch.int32)
MLP = {"activation": "gelu", "gated": True}
ANGLES = random_tensor(20, 8)
Q, K, V = (random_tensor(10, heads, 16, seed=heads) for heads in (HEADS.kept.width, 2, 3))
MAP = (torch.arange(4 * Q.shape[1]).view(4, -1) % 2).int()
SEQUENCES = ops.SequencePlan.of(HEADS.rows.sizes, range(4)).tiles

# Every argument there is, so that two of them in the wrong order show.
CALLS = {
    "token_nll": (random_logits(10, 50), {}),
    "lm_head_nll": (
        (X, random_tensor(50, 40), LABELS, random_tensor(50)),
        {"scale": 0.5, "softcap": 3.0},
    ),
    "glu_mask": ((random_tensor(10, 12), WAVE.keep, WAVE.rows.row_group), MLP),
    "kept_up_proj": ((X, random_tensor(12, 40, scale=0.2), *WAVE.tables, random_tensor(12)), MLP),
    "kept_down_proj": (
        (torch.zeros(10, 128), random_tensor(6, 40), *WAVE.tables, X[0], RESIDUAL),
        {},
    ),
    "kept_head_proj": (
        (
            *(X, random_tensor(96, 40), *HEADS.tables, random_tensor(96), random_tensor(16)),
            *(ANGLES.cos(), ANGLES.sin(), torch.arange(10)),
        ),
        {"head_dim": 16, "norm_eps": 1e-3},
    ),
    "grouped_attention": (
        (Q, K, V[:, :2], HEADS.kept.count, MAP, SEQUENCES),
        {"scale": 0.3, "causal": True, "window": 2, "softcap": 4.0},
    ),
    "kept_o_proj": ((Q, random_tensor(40, 96), *HEADS.tables, X[0], RESIDUAL), {}),
    "column_moments": ((X,), {}),
    "compact_rows": ((X, INDEX, torch.ones(4, 40)), {}),
    "compact_columns": ((X, INDEX, torch.ones(10, 4)), {}),
}


@pytest.mark.parametrize("name", ALL)
def test_all_paths_take_the_same_arguments(name):
    """The path for the GPU and the fake must not drift from the op where no GPU would notice."""
    op = ALL[name]
    assert "cuda" in op._backend_fns
    expected = inspect.signature(op._init_fn)
    assert inspect.signature(op._abstract_fn) == expected
    assert inspect.signature(cuda_path(op)) == expected


def cuda_path(op):
    """What CUDA tensors would get; a decorator leaves the function itself in the op's module."""
    return getattr(sys.modules[op._init_fn.__module__], f"_{op._init_fn.__name__}_cuda")


@pytest.mark.parametrize("name", CALLS)
def test_cuda_path_equals_cpu_path(name):
    args, kwargs = CALLS[name]
    expected = ALL[name](*args, **kwargs)
    if expected is None:  # the workspace is the result
        expected = args[-1].clone()
        args[-1].fill_(7)
    actual = cuda_path(ALL[name])(*args, **kwargs)
    actual = args[-1] if actual is None else actual
    # Sums over tokens are float64 that grew from float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_op_is_called():
    assert set(ALL) == set(CALLS)
