"""Losses with own output projections are recorded, and never taken for those without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compensated_cases import Refit
from scoring_cases import related_masks
from searches import new_search
from surgery_cases import tokens
from tiny import tiny_llama


def test_recorded_under_their_own_name(tmp_path: Path) -> None:
    model, input_ids = tiny_llama(), tokens(3)
    masks = related_masks(new_search(model, tmp_path / "run").task.layout)[:5]

    def start():
        return new_search(model, tmp_path / "run")

    search, refit = start(), Refit(model)
    plain = search.losses("plans", masks, input_ids)
    own = search.losses("plans", masks, input_ids, output_weights=refit)
    other = search.losses(
        "plans", masks, input_ids, output_weights=Refit(model, skip=0), compensation="sequential"
    )
    assert search.submodels_scored == 15
    for losses, weights in ((plain, None), (own, refit), (other, Refit(model, skip=0))):
        expected = search.task.scorer.score(masks, input_ids, output_weights=weights)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert len({float(losses[0, 0]) for losses in (plain, own, other)}) == 3

    def never(block, keep_parts):
        raise AssertionError("it is recorded")

    again = start()
    assert torch.equal(again.losses("plans", masks, input_ids), plain)
    assert torch.equal(again.losses("plans", masks, input_ids, output_weights=never), own)
    found = again.losses("plans", masks, input_ids, output_weights=never, compensation="sequential")
    assert torch.equal(found, other) and again.submodels_scored == 0
    with pytest.raises(AssertionError, match="it is recorded"):
        again.losses("plans", masks, input_ids, output_weights=never, compensation="another")
