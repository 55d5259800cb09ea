"""Rows of a wave in chunks: every row once, with its mask, and stored where it belongs."""

from __future__ import annotations

import pytest
import torch

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.mask_tree import Branch
from bonsai_fast.scoring.fused.row_batches import RowBatches

SEQUENCES = 3


def states() -> torch.Tensor:
    """Slot s, sequence b: filled with 10 s + b."""
    numbers = 10.0 * torch.arange(5)[:, None] + torch.arange(SEQUENCES)
    return numbers[:, :, None, None].expand(5, SEQUENCES, 2, 4).contiguous()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 100])
@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 2, 4], [3], [4, 0]])
def test_updates_are_stored(slots: list[int], chunk_rows: int) -> None:
    """Also of slots that are not adjacent, whose rows are gathered first."""
    found = states()
    batches = RowBatches(found, chunk_rows, Arithmetic(found))
    seen: list[float] = []
    branches = [Branch(slot, mask=7 + slot) for slot in slots]
    for rows, inputs, masks in batches.of_branches(branches):
        assert len(rows) == len(masks) <= chunk_rows
        assert inputs.data_ptr() == rows.data_ptr()
        numbers = rows[:, 0, 0].tolist()
        assert masks == [7 + number // 10 for number in numbers]
        seen += numbers
        rows.add_(0.5)
    assert seen == [10.0 * slot + number for slot in slots for number in range(SEQUENCES)]
    expected = states()
    expected[slots] += 0.5
    assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 3]])
def test_what_is_read_may_be_stored_elsewhere(slots: list[int], chunk_rows: int) -> None:
    found, inputs = states(), states() + 100
    batches = RowBatches(found, chunk_rows, Arithmetic(found), inputs)
    for rows, read, _ in batches.of_branches([Branch(slot, mask=0) for slot in slots]):
        assert torch.equal(read, rows + 100)
        rows.add_(0.5)
    for _, rows, read in batches.of_slot(4):
        assert torch.equal(read, rows + 100)
    assert torch.equal(inputs, states() + 100)
    expected = states()
    expected[slots] += 0.5
    assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_chunks_of_one_slot_are_views(chunk_rows: int) -> None:
    found = states()
    for here, rows, _ in RowBatches(found, chunk_rows, Arithmetic(found)).of_slot(2):
        assert len(rows) <= chunk_rows and torch.equal(rows, found[2, here])
        rows.add_(0.5)
    expected = states()
    expected[2] += 0.5
    assert torch.equal(found, expected)
