"""grouped_attention: q [T, slots, D], k, v [T, kv_slots, D] -> [T, slots, D], any q-to-KV map."""

from __future__ import annotations

import math

import pytest
import torch
from op_paths import both, kernel_of, refusals
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import KERNEL_DTYPES, assert_within_baseline, random_tensor
from bonsai_fast.testing.reference import grouped_attention_reference

pytest.importorskip("triton")


pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned_empty")]

KERNEL, FUNCTIONS = kernel_of(ops.grouped_attention), both(ops.grouped_attention)
# tokens and sub-model of every sequence, slots, query heads of every sub-model, KV slots, head_dim
SHAPES = [
    pytest.param([128, 256], [0, 1], 2, [2, 2], 2, 128, id="aligned"),
    pytest.param([45, 45, 131, 7], [0, 0, 1, 3], 6, [5, 6, 2, 0], 2, 80, id="gqa-3-ragged"),
    pytest.param([45, 200], [0, 1], 4, [3, 1], 1, 64, id="gqa-4"),
    pytest.param([1, 2], [0, 1], 1, [1, 1], 1, 16, id="one"),
    pytest.param([33], [0], 2, [2], 2, 6, id="tiny-heads"),
    pytest.param([70], [0], 1, [1], 1, 256, id="Gemma"),
]


def make(lengths, groups, num_slots, counts, kv_slots, head_dim, *, dtype=torch.float32, device):
    """q, k, v and the tables; query slots that nobody may read are NaN, maps are random."""
    num_rows, options = sum(lengths), {"dtype": dtype, "device": device}
    q = random_tensor(num_rows, num_slots, head_dim, scale=2, **options)
    k = random_tensor(num_rows, kv_slots, head_dim, seed=1, **options)
    v = random_tensor(num_rows, kv_slots, head_dim, seed=2, **options)
    begin = 0
    for length, group in zip(lengths, groups, strict=True):
        q[begin : begin + length, counts[group] :] = math.nan
        begin += length
    generator = torch.Generator().manual_seed(3)
    q_to_kv = torch.randint(kv_slots, (len(counts), num_slots), generator=generator)
    plan = ops.SequencePlan.of(lengths, groups, device=device)
    count = torch.tensor(counts, dtype=torch.int32, device=device)
    return q, k, v, count, q_to_kv.to(device, torch.int32), plan.tiles


def check(function, lengths, groups, arguments, **options):
    q, k, v, count, q_to_kv, _ = arguments
    options = {"scale": q.shape[2] ** -0.5} | options

    def reference(q, k, v):
        return grouped_attention_reference(q, k, v, count, q_to_kv, lengths, groups, **options)

    assert_within_baseline(function(*arguments, **options), reference, q, k, v)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("lengths, groups, num_slots, counts, kv_slots, head_dim", SHAPES)
def test_agrees_with_reference(
    lengths, groups, num_slots, counts, kv_slots, head_dim, dtype, function, device
):
    case = (lengths, groups, num_slots, counts, kv_slots, head_dim)
    check(function, lengths, groups, make(*case, dtype=dtype, device=device))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"causal": False}, id="everything-seen"),
        pytest.param({"window": 1}, id="itself-alone"),
        pytest.param({"window": 50}, id="window"),
        pytest.param({"window": 1000}, id="window-beyond"),
        pytest.param({"softcap": 3.0}, id="softcap"),
        pytest.param({"softcap": 3.0, "window": 70}, id="softcap-window"),
        pytest.param({"softcap": 3.0, "causal": False}, id="softcap-everything-seen"),
        pytest.param({"scale": 3.0}, id="scale"),
    ],
)
def test_masks_and_softcap(options, function, device):
    lengths, groups = [131, 20, 45], [0, 0, 1]
    case = make(lengths, groups, 2, [2, 1], 1, 32, device=device)
    check(function, lengths, groups, case, **options)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_head_finds_its_own_keys(function, device):
    """A wrong map or sub-model must show: each KV head holds its own number."""
    case = make([3, 40, 2], [0, 1, 0], 4, [4, 3], 3, 16, device=device)
    _, k, v, _, q_to_kv, _ = case
    k.zero_()
    v[:] = torch.arange(3.0, device=device)[None, :, None]
    out = function(*case, scale=1.0)
    for row in range(45):
        group = int(3 <= row < 43)
        for slot in range([4, 3][group]):
            expected = torch.full((16,), float(q_to_kv[group, slot]), device=device)
            torch.testing.assert_close(out[row, slot], expected)
    assert out[3:43, 3].eq(0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tokens_see_their_own_sequence_up_to_themselves(function, device):
    """With equal scores a token's answer is the mean of what it sees."""
    lengths = [5, 150, 3]
    q, k, v, *tables = make(lengths, [0, 0, 1], 1, [1, 1], 1, 16, device=device)
    q.zero_()
    expected = torch.cat(
        [part.cumsum(0) / torch.arange(1, len(part) + 1, device=device)[:, None, None]
         for part in v.split(lengths)]
    )  # fmt: skip
    torch.testing.assert_close(function(q, k, v, *tables, scale=1.0), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_large_scores_do_not_overflow(function, device):
    lengths, groups = [70, 33], [0, 1]
    q, *rest = make(lengths, groups, 2, [2, 2], 1, 32, device=device)
    check(function, lengths, groups, (q * 100, *rest))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_stays_in_its_submodel(function, device):
    """Sub-models share kernels, tiles and buffers, but no numbers."""
    case = make([40, 40, 40], [0, 1, 2], 2, [2, 2, 1], 2, 16, device=device)
    for tensor in case[:3]:
        tensor[40:80] = math.nan
    out = function(*case, scale=1.0)
    assert out[:40].isfinite().all() and out[40:80].isnan().all() and out[80:].isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_agrees_with_torch_on_uniform_heads(function, device):
    """Llama 3's map, 4 query heads a KV head, as PyTorch computes it."""
    q, k, v, count, _, tiles = make([60, 60], [0, 0], 8, [8], 2, 64, device=device)
    q_to_kv = (torch.arange(8, device=device) // 4).int()[None]
    out = function(q, k, v, count, q_to_kv, tiles, scale=0.125)
    q, k, v = (x.view(2, 60, -1, 64).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.view(2, 60, 8, 64).transpose(1, 2), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_takes_strided_heads(function, device):
    """q, k and v as views of one buffer, heads before tokens."""
    lengths, groups = [45, 20], [0, 1]
    q, k, v, *tables = make(lengths, groups, 3, [3, 2], 2, 16, device=device)
    buffer = torch.full((7, 65, 20), math.nan, device=device)
    views = []
    for tensor, heads in zip((q, k, v), buffer.split([3, 2, 2]), strict=True):
        views.append(heads[:, :, 2:18].transpose(0, 1).copy_(tensor))
    check(function, lengths, groups, (*views, *tables))


def test_a_row_does_not_depend_on_the_wave(device):
    """Bit for bit: which sequences share the wave must not matter."""
    q, k, v, count, q_to_kv, tiles = make([45, 131], [0, 1], 3, [3, 2], 2, 16, device=device)
    together = KERNEL(q, k, v, count, q_to_kv, tiles, scale=0.25)
    tiles = ops.SequencePlan.of([131], [0], device=device).tiles
    parts = (q[45:], k[45:], v[45:], count[1:], q_to_kv[1:], tiles)
    assert torch.equal(together[45:], KERNEL(*parts, scale=0.25))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_to_do(function, device):
    case = make([0], [0], 2, [2], 1, 16, device=device)
    assert function(*case, scale=1.0).shape == (0, 2, 16)
    q, k = torch.ones(3, 0, 16, device=device), torch.ones(3, 0, 16, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    q_to_kv = torch.zeros(1, 0, dtype=torch.int32, device=device)
    tiles = ops.SequencePlan.of([3], [0], device=device).tiles
    assert function(q, k, k, count, q_to_kv, tiles, scale=1.0).shape == (3, 0, 16)


def test_opcheck(device):
    case = make([20, 9], [0, 1], 3, [3, 3], 2, 16, device=device)
    torch.library.opcheck(ops.grouped_attention, case, {"scale": 0.25})
    options = {"scale": 0.25, "window": 4, "softcap": 5.0}
    torch.library.opcheck(ops.grouped_attention, case, options)


Q, K, V, COUNT, MAP, TILES = make([3, 2], [0, 1], 3, [3, 2], 2, 16, device="cpu")
RIGHT = {"q": Q, "k": K, "v": V, "count": COUNT, "q_to_kv": MAP, "tiles": TILES, "scale": 1.0}
WRONG = [
    pytest.param({"q": Q[0]}, r"q must be \[T, slots, D\], got \[3, 16\]", id="dims"),
    pytest.param({"q": Q.double()}, "q must be float16", id="dtype"),
    pytest.param({"q": torch.ones(5, 3, 300)}, "head_dim must be in 1..256, got 300", id="D"),
    pytest.param({"q": Q.transpose(1, 2)}, "q must be contiguous along its last", id="layout"),
    pytest.param({"k": K[1:]}, r"k must be \[5, any, 16\], got \[4, 2, 16\]", id="k"),
    pytest.param({"v": V[:, 1:]}, r"v must be \[5, 2, 16\], got \[5, 1, 16\]", id="v"),
    pytest.param({"v": V.half()}, "v must be float32", id="mix"),
    pytest.param({"q_to_kv": MAP.long()}, "q_to_kv must be int32", id="map-type"),
    pytest.param({"q_to_kv": MAP[:, 1:]}, r"q_to_kv must be \[2, 3\], got \[2, 2\]", id="map"),
    pytest.param({"tiles": TILES[:, :3]}, r"tiles must be \[any, 4\]", id="tiles"),
    pytest.param({"window": 0}, "window must be positive.* got 0", id="window"),
    pytest.param({"window": 5, "causal": False}, "attention causal", id="window-and-future"),
    pytest.param({"softcap": -1.0}, "softcap must be positive, got -1.0", id="softcap"),
]


test_says_what_is_wrong = refusals(ops.grouped_attention, RIGHT, WRONG)
