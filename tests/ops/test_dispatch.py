"""Every op's CUDA path, run by Triton's interpreter where there is no GPU, equals its CPU path."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from op_paths import kernel_of

from bonsai_fast import ops
from bonsai_fast.testing.cases import random_logits, random_tensor, random_wave

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

ALL = {name: getattr(ops, name) for name in ops.__all__ if name.islower()}
FILES = {path.stem for path in (Path(ops.__file__).parent).glob("[!_]*.py")}
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
def test_the_launcher_takes_the_arguments_of_the_op(name):
    """It is called with all of them by name, and with the result as `out`."""
    file = name if name in FILES else "compact"
    module = importlib.import_module(f"bonsai_fast.kernels.{file}")
    taken = set(inspect.signature(getattr(module, f"{name}_triton")).parameters)
    assert taken == {"out", *inspect.signature(ALL[name]._init_fn).parameters}


@pytest.mark.parametrize("name", CALLS)
def test_cuda_path_equals_cpu_path(name):
    args, kwargs = CALLS[name]
    expected = ALL[name](*args, **kwargs)
    if expected is None:  # the workspace is the result
        expected = args[-1].clone()
        args[-1].fill_(7)
    actual = kernel_of(ALL[name])(*args, **kwargs)
    actual = args[-1] if actual is None else actual
    # Sums over tokens are float64 that grew from float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_op_is_called():
    assert set(ALL) == set(CALLS)
