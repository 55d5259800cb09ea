"""Plans: rows, sequences and kept units as the index tables that kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_fast.kernels._sizes import BLOCK_ROWS, INDEX_PADDING
from bonsai_fast.ops import HeadLists, KeptLists, RowPlan, SequencePlan

SIZES = [
    pytest.param([BLOCK_ROWS, 2 * BLOCK_ROWS], id="aligned"),
    pytest.param([5, 0, 300, 1, BLOCK_ROWS + 1], id="ragged"),
    pytest.param([1], id="one-row"),
    pytest.param([0, 0], id="no-rows"),
    pytest.param([], id="no-groups"),
]


def check_rows(sizes: list[int]) -> None:
    plan = RowPlan.of(sizes)
    assert plan.num_rows == sum(sizes) and plan.tiles.dtype == plan.row_group.dtype == torch.int32
    owners = [group for group, size in enumerate(sizes) for _ in range(size)]
    assert plan.row_group.tolist() == owners
    covered = []
    for group, first, end in plan.tiles.tolist():
        assert 0 < end - first <= BLOCK_ROWS
        assert all(owners[row] == group for row in range(first, end))
        covered += range(first, end)
    assert covered == list(range(sum(sizes))), "every row once, in order"


@pytest.mark.parametrize("sizes", SIZES)
def test_tiles_cover_every_row_once(sizes):
    check_rows(sizes)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3 * BLOCK_ROWS), max_size=6))
def test_tiles_cover_every_row_once_whatever_the_sizes(sizes):
    check_rows(sizes)


@pytest.mark.parametrize("lengths", SIZES)
def test_sequences_are_covered_once(lengths):
    groups = [3 * position for position in range(len(lengths))]
    plan = SequencePlan.of(lengths, groups)
    starts = [sum(lengths[:position]) for position in range(len(lengths))]
    covered = []
    for group, first, begin, end in plan.tiles.tolist():
        position = groups.index(group)
        assert (begin, end) == (starts[position], starts[position] + lengths[position])
        assert (first - begin) % BLOCK_ROWS == 0 and first < end
        covered += range(first, min(first + BLOCK_ROWS, end))
    assert sorted(covered) == list(range(sum(lengths)))


def test_the_longest_rows_of_attention_come_first():
    """A tile with many keys that starts last would leave the GPU idle beside it."""
    tiles = SequencePlan.of([2 * BLOCK_ROWS + 7, 50], [0, 1]).tiles
    work = (tiles[:, 1] - tiles[:, 2]).tolist()
    assert work == sorted(work, reverse=True) and work[0] > 0


@pytest.mark.parametrize("multiple", [1, 128])
def test_kept_lists(multiple):
    """The positions of True, in order; what is read past the end is kept as well."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(4, 90, generator=generator) < 0.6
    keep[1], keep[2] = False, True
    lists = KeptLists.of(keep, multiple=multiple)
    assert lists.count.tolist() == keep.sum(1).tolist()
    assert lists.width % multiple == 0 and lists.width - multiple < 90 <= lists.width
    assert lists.index.shape == (4, lists.width + INDEX_PADDING)
    for group, count in enumerate(lists.count.tolist()):
        expected = keep[group].nonzero()[:, 0].tolist()
        padding = [expected[-1] if expected else 0] * (lists.index.shape[1] - count)
        assert lists.index[group].tolist() == expected + padding


def test_kept_lists_of_nothing():
    lists = KeptLists.of(torch.zeros(3, 5, dtype=torch.bool), multiple=128)
    assert lists.width == 0 and lists.count.tolist() == [0, 0, 0]
    assert KeptLists.of(torch.zeros(2, 0, dtype=torch.bool)).index.eq(0).all()
    assert KeptLists.of(torch.zeros(0, 7, dtype=torch.bool)).index.shape == (0, INDEX_PADDING)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_head_lists(num_kv_heads):
    """Every kept query head finds the KV head it had, and no KV head is there for nothing."""
    keep = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[1], keep[2] = False, True
    lists = HeadLists.of(keep, num_kv_heads=num_kv_heads)
    assert lists.q_to_kv.shape == (5, lists.query.width) and lists.q_to_kv.dtype == torch.int32
    for group in range(5):
        heads = keep[group].nonzero()[:, 0].tolist()
        assert lists.query.index[group, : len(heads)].tolist() == heads
        kv = lists.kv.index[group, : lists.kv.count[group]].tolist()
        assert kv == sorted({head * num_kv_heads // 6 for head in heads})
        found = [kv[slot] for slot in lists.q_to_kv[group, : len(heads)].tolist()]
        assert found == [head * num_kv_heads // 6 for head in heads]
    assert lists.q_to_kv.min() >= 0 and lists.q_to_kv.max() < max(1, lists.kv.width)


def test_head_lists_of_unevenly_shared_kv_heads():
    """As pruning leaves them: five query heads read three KV heads, two, one and two."""
    keep = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    lists = HeadLists.reading(keep, (0, 0, 1, 2, 2))
    assert lists.kv.count.tolist() == [2, 2, 0]
    assert lists.kv.index[:2, :2].tolist() == [[0, 2], [1, 2]]
    assert lists.q_to_kv[0].tolist() == [0, 1, 1] and lists.q_to_kv[1, :2].tolist() == [0, 1]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: HeadLists.of(torch.ones(2, 3).bool(), num_kv_heads=2), "divide 3, got 2"),
        (lambda: HeadLists.reading(torch.ones(2, 3).bool(), [0]), "expected 3 KV heads.*got 1"),
        (lambda: RowPlan.of([3, -1]), "not be negative, got -1"),
        (lambda: RowPlan.of([2**31]), r"less than 2\^31 rows, got 2147483648"),
        (lambda: SequencePlan.of([3, 4], [0]), "expected 2 groups, one per sequence, got 1"),
        (lambda: SequencePlan.of([-3], [0]), "not be negative, got -3"),
        (lambda: KeptLists.of(torch.ones(2, 3)), r"bool \[K, N\], got torch.float32 \[2, 3\]"),
        (lambda: KeptLists.of(torch.ones(2).bool()), r"bool \[K, N\], got torch.bool \[2\]"),
        (lambda: KeptLists.of(torch.ones(2, 3, device="meta").bool()), "on the CPU.*meta"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
