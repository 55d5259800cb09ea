"""lm_head_nll: x [T, H], W [V, H], labels [T] -> float32 [T], nats; no logit is written."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from op_paths import both, kernel_of, refusals
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import KERNEL_DTYPES, assert_within_baseline, random_tensor
from bonsai_fast.testing.reference import lm_head_nll_reference

pytest.importorskip("triton")

from bonsai_fast.kernels import lm_head_nll as module

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

KERNEL, FUNCTIONS = kernel_of(ops.lm_head_nll), both(ops.lm_head_nll)
# rows, hidden size, vocabulary: tiles are 128 rows by 64 to 256 tokens
SHAPES = [
    pytest.param(128, 128, 512, id="aligned"),
    pytest.param(131, 72, 203, id="ragged"),
    pytest.param(1200, 33, 300, id="many-tiles"),
    pytest.param(5, 40, 1030, id="many-columns"),
    pytest.param(1, 1, 1, id="one"),
]


def make(num_rows, hidden_size, vocab_size, *, dtype=torch.float32, device):
    """x, weight, labels and bias, for logits as spread as a trained model's."""
    options = {"dtype": dtype, "device": device}
    x = random_tensor(num_rows, hidden_size, **options)
    scale = 4 * hidden_size**-0.5
    weight = random_tensor(vocab_size, hidden_size, seed=1, scale=scale, **options)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator).to(device)
    return x, weight, labels, random_tensor(vocab_size, seed=3, **options)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("num_rows, hidden_size, vocab_size", SHAPES)
def test_agrees_with_reference(num_rows, hidden_size, vocab_size, dtype, function, device):
    x, weight, labels, _ = make(num_rows, hidden_size, vocab_size, dtype=dtype, device=device)
    assert_within_baseline(function(x, weight, labels), lm_head_nll_reference, x, weight, labels)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 30.0)])
def test_bias_scale_and_softcap(scale, softcap, has_bias, function, device):
    x, weight, labels, bias = make(9, 40, 203, device=device)
    inputs = (x, weight, labels, bias) if has_bias else (x, weight, labels)
    options = {"scale": scale, "softcap": softcap}
    reference = partial(lm_head_nll_reference, **options)
    assert_within_baseline(function(*inputs, **options), reference, *inputs)


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 256, 257, 700])
def test_every_logit_counts_once(vocab_size, device):
    """A logit skipped or counted twice must show: all are alike, so nll = log V."""
    x = torch.zeros(3, 16, device=device)
    labels = torch.full((3,), vocab_size - 1, device=device)
    nll = KERNEL(x, torch.ones(vocab_size, 16, device=device), labels)
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(vocab_size)), rtol=0, atol=1e-6)


def test_every_label_is_found(device):
    """A label that is off by a tile or a column must show: token v's logit is 0.01 v."""
    vocab_size = 700
    x = torch.full((vocab_size, 1), 0.01, device=device)
    weight = torch.arange(float(vocab_size), device=device)[:, None]
    labels = torch.arange(vocab_size, device=device)
    assert_within_baseline(KERNEL(x, weight, labels), lm_head_nll_reference, x, weight, labels)


@pytest.mark.parametrize("position", [0, 255, 256, 699])
@pytest.mark.parametrize("size", [60.0, 1e4, -1e4])
def test_one_logit_may_dwarf_the_others(size, position, device):
    """A sum that is not rescaled when a later tile brings a larger logit must show."""
    x, weight, labels, _ = make(5, 40, 700, device=device)
    x[:, 0], weight[position, 0] = 1.0, size
    assert_within_baseline(KERNEL(x, weight, labels), lm_head_nll_reference, x, weight, labels)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_infinities_are_those_of_torch(function, device):
    bias = make(4, 40, 300, device=device)[3]
    x, weight = torch.zeros(4, 40, device=device), torch.zeros(300, 40, device=device)
    labels = torch.tensor([0, 299, 7, 8], device=device)
    for change in ([7], [299, 280], slice(None)):
        changed = bias.clone()
        changed[change] = -math.inf
        expected = F.cross_entropy(changed.expand(4, -1), labels, reduction="none")
        nll = function(x, weight, labels, changed)
        torch.testing.assert_close(nll, expected, equal_nan=True)
    bias[270] = math.inf
    assert function(x, weight, labels, bias).isnan().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_stays_in_its_row(function, device):
    x, weight, labels, _ = make(140, 40, 300, device=device)
    x[3, 5], x[139] = math.nan, math.nan
    assert function(x, weight, labels).isnan().nonzero()[:, 0].tolist() == [3, 139]


def test_a_row_does_not_depend_on_the_others(device):
    """Bit for bit, alone and in a batch and from run to run."""
    x, weight, labels, _ = make(131, 72, 300, device=device)
    together = KERNEL(x, weight, labels)
    for row in (0, 77, 130):
        alone = KERNEL(x[row : row + 1], weight, labels[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(together, KERNEL(x, weight, labels))


def test_rows_come_in_chunks(device, monkeypatch):
    """The buffer of one chunk is used again by the next, which is shorter."""
    x, weight, labels, _ = make(150, 40, 300, device=device)
    expected = KERNEL(x, weight, labels)
    monkeypatch.setattr(module, "MAX_ROWS", 128)
    assert torch.equal(KERNEL(x, weight, labels), expected)


@pytest.mark.parametrize("label", [-1, 300, 511, 512, -(2**40), 2**40])
def test_a_label_out_of_range_gives_nan(label, device):
    x, weight, labels, _ = make(4, 40, 300, device=device)
    labels[1] = label
    nll = KERNEL(x, weight, labels)
    assert nll.isnan().tolist() == [False, True, False, False]


def test_cpu_names_a_label_out_of_range():
    x, weight, labels, _ = make(4, 40, 300, device="cpu")
    labels[1] = 300
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.299, got .*300"):
        ops.lm_head_nll(x, weight, labels)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_takes_strided_rows(function, device):
    values, weight, labels, _ = make(9, 40, 203, device=device)
    x = torch.full((18, 60), math.nan, device=device)[::2, 7:47].copy_(values)
    wider = torch.full((203, 50), math.nan, device=device)[:, 3:43].copy_(weight)
    assert_within_baseline(
        function(x, wider, labels), lm_head_nll_reference, values, weight, labels
    )


@pytest.mark.gpu
def test_weights_beyond_32_bits(device):
    """256k tokens of 8192 numbers each: the last rows lie 2^31 elements away."""
    weight = torch.zeros(262400, 8192, dtype=torch.bfloat16, device=device)
    weight[-1] = 1.0
    x = torch.full((3, 8192), 2.0**-10, dtype=torch.bfloat16, device=device)
    labels = torch.tensor([0, 262399, 262398], device=device)
    # All logits are 0, but the last token's, which is 8.
    total = math.log(262399 + math.exp(8))
    expected = torch.tensor([total, total - 8, total], device=device)
    nll = KERNEL(x, weight, labels)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def test_opcheck(device):
    x, weight, labels, bias = make(6, 40, 203, device=device)
    torch.library.opcheck(ops.lm_head_nll, (x, weight, labels))
    options = {"scale": 0.5, "softcap": 30.0}
    torch.library.opcheck(ops.lm_head_nll, (x, weight, labels, bias), options)


X, WEIGHT, LABELS, BIAS = make(3, 8, 5, device="cpu")
RIGHT = {"x": X, "weight": WEIGHT, "labels": LABELS, "bias": BIAS}
WRONG = [
    pytest.param({"x": X[0]}, r"x must be \[T, H\], got \[8\]", id="dims"),
    pytest.param({"x": X.double()}, "x must be float16", id="dtype"),
    pytest.param({"weight": WEIGHT.half()}, "weight must be float32", id="mix"),
    pytest.param({"weight": WEIGHT[:, 1:]}, r"weight must be \[any, 8\], got \[5, 7\]", id="H"),
    pytest.param({"weight": WEIGHT[:0]}, r"V >= 1, got \[0, 8\]", id="no-vocabulary"),
    pytest.param({"labels": LABELS.int()}, "labels must be int64", id="label-type"),
    pytest.param({"labels": LABELS[1:]}, r"labels must be \[3\], got \[2\]", id="labels"),
    pytest.param({"bias": BIAS[1:]}, r"bias must be \[5\], got \[4\]", id="bias"),
    pytest.param({"softcap": 0.0}, "softcap must be positive, got 0.0", id="softcap"),
    pytest.param({"softcap": math.nan}, "softcap must be positive, got nan", id="softcap-nan"),
]


test_says_what_is_wrong = refusals(ops.lm_head_nll, RIGHT, WRONG)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_rows(function, device):
    x, weight, labels, _ = make(0, 8, 5, device=device)
    assert function(x, weight, labels).shape == (0,)
