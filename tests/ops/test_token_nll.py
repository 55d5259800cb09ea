"""token_nll: logits [N, V], labels [N] -> float32 [N], nats; one pass, every row on its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from op_paths import kernel_of, refusals
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import (
    KERNEL_DTYPES,
    MODEL_SHAPES,
    assert_within_baseline,
    random_logits,
)
from bonsai_fast.testing.reference import token_nll_reference

pytest.importorskip("triton")

from bonsai_fast.kernels.token_nll import _token_nll_kernel

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

KERNEL = kernel_of(ops.token_nll)
BLOCK_V = _token_nll_kernel.configs[0].kwargs["BLOCK_V"]
SHAPES = [
    pytest.param((8, 2 * BLOCK_V), id="aligned"),
    pytest.param((3, BLOCK_V), id="one-tile"),
    pytest.param((19, 2 * BLOCK_V + 941), id="ragged"),
    pytest.param((17, BLOCK_V - 1), id="within-a-tile"),
    pytest.param((7, 41), id="small"),
    pytest.param((1, 3000), id="one-row"),
    pytest.param((5, 1), id="one-token"),
    *(pytest.param((2, shape.vocab_size), id=shape.name) for shape in MODEL_SHAPES),
    pytest.param((2, 50257), id="GPT-2"),
]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_reference(shape, dtype, device):
    logits, labels = random_logits(*shape, dtype=dtype, device=device)
    assert_within_baseline(KERNEL(logits, labels), token_nll_reference, logits, labels)


def test_every_label_of_a_row_is_found(device):
    """A gather that is off by one, or by the skew of a row off the boundary, must show."""
    vocab_size = BLOCK_V + 5
    logits = torch.arange(vocab_size, device=device).mul(0.01).expand(vocab_size, -1).contiguous()
    labels = torch.arange(vocab_size, device=device)[:: vocab_size // 63]
    logits = logits[: len(labels)]
    assert_within_baseline(KERNEL(logits, labels), token_nll_reference, logits, labels)


@pytest.mark.parametrize("vocab_size", [41, 2 * BLOCK_V, 2 * BLOCK_V + 941])
def test_every_logit_counts_once(vocab_size, device):
    """A logit skipped or counted twice must show: all are alike, so nll = log V."""
    logits = torch.zeros(4, vocab_size, device=device)
    nll = KERNEL(logits, torch.zeros(4, dtype=torch.int64, device=device))
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(vocab_size)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("position", [0, 1, BLOCK_V - 1, BLOCK_V, 2 * BLOCK_V - 1, 2 * BLOCK_V, -1])
def test_the_largest_logit_may_be_anywhere(position, device):
    """A sum that is not rescaled when a later tile brings a larger logit must show."""
    logits, labels = random_logits(3, 2 * BLOCK_V + 77, device=device)
    logits[:, position] = 60.0
    assert_within_baseline(KERNEL(logits, labels), token_nll_reference, logits, labels)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype, device):
    """exp(logit) overflows float32 from 89 on; the answer does not."""
    logits, labels = random_logits(6, 700, dtype=dtype, device=device)
    logits *= torch.tensor([[1], [-1], [100], [-100], [1000], [-1000]], device=device)
    assert_within_baseline(KERNEL(logits, labels), token_nll_reference, logits, labels)


def test_rows_do_not_depend_on_each_other(device):
    """A row must be the same to the last bit alone and in a batch, and from run to run."""
    logits, labels = random_logits(6, BLOCK_V + 333, device=device)
    together = KERNEL(logits, labels)
    alone = [KERNEL(logits[n : n + 1], labels[n : n + 1]) for n in range(len(labels))]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, KERNEL(logits, labels))


@pytest.mark.parametrize("position", [0, 100, BLOCK_V + 3, -1])
def test_nan_stays_in_its_row(position, device):
    """A maximum that drops NaN would give a number; a shared accumulator would spread it."""
    logits, labels = random_logits(4, 2 * BLOCK_V + 7, device=device)
    expected = KERNEL(logits, labels)
    expected[2] = math.nan
    logits[2, position] = math.nan
    nll = KERNEL(logits, labels)
    torch.testing.assert_close(nll, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_infinities_are_those_of_torch(dtype, device):
    """inf - inf is NaN: it must arise where it does in torch, and nowhere else."""
    logits, labels = random_logits(9, 2 * BLOCK_V + 7, dtype=dtype, device=device)
    labels[:] = 5
    logits[0, ::2] = -math.inf
    logits[1, 6:] = -math.inf
    logits[2, :-1] = -math.inf
    logits[3, :] = -math.inf
    logits[4, :] = torch.finfo(dtype).min
    logits[5, 100:] = torch.finfo(dtype).min
    logits[6, 5] = math.inf
    logits[7, BLOCK_V + 9] = math.inf
    logits[8, [3, -1]] = math.inf
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    assert expected.isnan().tolist() == [False, False, False, True, False, False, True, True, True]
    torch.testing.assert_close(KERNEL(logits, labels), expected, equal_nan=True)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 16])
@pytest.mark.parametrize("vocab_size", [41, BLOCK_V, 3 * BLOCK_V - 1])
def test_reads_nothing_outside_a_strided_row(vocab_size, start, every, device):
    """The row's neighbours are NaN, so a tile that reaches beyond its row shows."""
    whole = torch.full((7, 3 * BLOCK_V + 21), math.nan, device=device)
    logits = whole[1::every, start : start + vocab_size]
    values, labels = random_logits(*logits.shape, device=device)
    logits.copy_(values)
    assert_within_baseline(KERNEL(logits, labels), token_nll_reference, values, labels)


def test_strided_labels(device):
    """Labels cut from a [B, T] batch are not contiguous."""
    logits, _ = random_logits(5, 300, device=device)
    labels = torch.arange(50, device=device).view(5, 10)[:, 3]
    assert not labels.is_contiguous()
    assert_within_baseline(KERNEL(logits, labels), token_nll_reference, logits, labels)


def test_a_label_out_of_range_is_not_followed(device):
    """Such a label must give NaN in its row, never a read outside the logits."""
    logits, labels = random_logits(4, 300, device=device)
    expected = KERNEL(logits, labels)
    labels[1], labels[3] = -100, 300
    expected[[1, 3]] = math.nan
    nll = KERNEL(logits, labels)
    torch.testing.assert_close(nll, expected, rtol=0, atol=0, equal_nan=True)


def test_no_rows(device):
    """A grid of no programs is an error on a GPU."""
    nll = KERNEL(*random_logits(0, 7, device=device))
    assert nll.shape == (0,)
    assert nll.dtype == torch.float32


def test_offsets_beyond_int32(device):
    """The third row starts 2**31 elements in, though its stride fits: 32 bits would wrap."""
    vocab_size, stride = 41, 2**30
    if device.type == "cuda":
        storage = torch.zeros(2 * stride + vocab_size, dtype=torch.float16, device=device)
    else:
        # NumPy's zeros are mapped, not written, so that this costs no memory.
        storage = torch.from_numpy(np.zeros(2 * stride + vocab_size, dtype=np.float16))
    logits = storage.as_strided((3, vocab_size), (stride, 1))
    values, labels = random_logits(3, vocab_size, dtype=torch.float16, device=device)
    logits.copy_(values)
    assert_within_baseline(KERNEL(logits, labels), token_nll_reference, values, labels)


LOGITS = torch.zeros(2, 3)
LABELS = torch.zeros(2, dtype=torch.int64)
RIGHT = {"logits": LOGITS, "labels": LABELS}
WRONG = [
    pytest.param({"logits": LOGITS[None]}, r"be \[N, V\], got \[1, 2, 3\]", id="dims"),
    pytest.param({"logits": LOGITS[:, :0]}, r"V >= 1, got \[2, 0\]", id="no-vocabulary"),
    pytest.param({"logits": LOGITS.double()}, "float32, got torch.float64", id="dtype"),
    pytest.param({"logits": LOGITS.t()[:2]}, "contiguous along its last dim", id="transposed"),
    pytest.param({"labels": LABELS.int()}, "int64, got torch.int32", id="label-dtype"),
    pytest.param({"labels": LABELS[:1]}, r"labels must be \[2\], got \[1\]", id="label-count"),
    pytest.param({"labels": LABELS[:, None]}, r"be \[2\], got \[2, 1\]", id="label-dims"),
    pytest.param({"labels": LABELS.to("meta")}, "be on cpu, got meta", id="label-device"),
]
test_says_what_is_wrong = refusals(ops.token_nll, RIGHT, WRONG)
