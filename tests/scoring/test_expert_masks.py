"""Experts as units: a masked expert is one that does not exist, for every way to route."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from mixtures import MIXTURES, STORED_DIFFERENTLY, without_channels, without_experts
from surgery_cases import logits_of, tokens
from torch.nn import functional as F
from transformers import PreTrainedModel

from bonsai_fast.models import ExpertsBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer, masked


def slow_losses(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of each sequence from the model's own logits, float32 [B]."""
    logits = logits_of(model, input_ids)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    return losses.mean(dim=1)


def expert_masks(layout: Layout, seed: int = 0) -> torch.Tensor:
    """Rows that keep other experts each, down to one and none; other units stay."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.ones(6, len(layout), dtype=torch.bool)
    for group in layout.groups:
        if group.kind == "expert":
            shares = torch.tensor([1.0, 0.7, 0.5, 0.3, 0.0, 0.0])[:, None]
            draw = torch.rand(6, len(group), generator=generator) < shares
            draw[4, int(torch.randint(len(group), (), generator=generator))] = True
            masks[:, group.start : group.stop] = draw
    return masks


def kept_parts_of_mixtures(layout: Layout, keep: torch.Tensor) -> dict[str, list[int]]:
    return {
        block.module: kept.nonzero().flatten().tolist()
        for block, kept in layout.keep_by_block(keep)
        if isinstance(block, ExpertsBlock)
    }


def mixtures(layout: Layout) -> Iterable[ExpertsBlock]:
    return layout.decoder.experts.values()


@pytest.mark.parametrize("family", MIXTURES)
def test_masked_experts_are_removed_experts(family: str) -> None:
    """Every row of the batch has its own router; the naive model has fewer rows."""
    model, input_ids = MIXTURES[family](), tokens()
    layout = Layout.of(model)
    assert layout.num_by_kind["expert"] == sum(block.num_experts for block in mixtures(layout))
    masks = expert_masks(layout)
    scored = MaskScorer(model, layout=layout).score(masks, input_ids)
    # one expert is as few as none where a router needs two
    alike = any(block.fewest > 1 for block in mixtures(layout))
    assert len({round(float(loss), 4) for loss in scored[:, 0]}) == len(masks) - alike
    for keep, losses in zip(masks, scored, strict=True):
        smaller = without_experts(model, kept_parts_of_mixtures(layout, keep), family == "gpt_oss")
        wanted = slow_losses(smaller, input_ids)
        torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", STORED_DIFFERENTLY)
def test_logits_of_a_mask(family: str) -> None:
    """Closer than losses: all logits, to 1e-5 of their size."""
    model, input_ids = MIXTURES[family](), tokens()
    layout = Layout.of(model)
    keep = expert_masks(layout, seed=1)[2]
    with masked(model, layout, keep.expand(len(input_ids), -1)):
        found = logits_of(model, input_ids)
    smaller = without_experts(model, kept_parts_of_mixtures(layout, keep), family == "gpt_oss")
    wanted = logits_of(smaller, input_ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(model, input_ids), logits_of(MIXTURES[family](), input_ids))


@pytest.mark.parametrize("family", (*STORED_DIFFERENTLY, "qwen3_moe"))
def test_masked_channels_are_removed_channels(family: str) -> None:
    """The same channels of all experts of a layer, others in each row of the batch."""
    model, input_ids = MIXTURES[family](), tokens()
    layout = Layout.of(model, experts="channel")
    groups = [g for g in layout.groups if isinstance(g.block, ExpertsBlock)]
    assert len(groups) == len(layout.decoder.experts) and layout.has_mixtures
    masks = torch.ones(4, len(layout), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        shares = torch.tensor([1.0, 0.7, 0.3, 0.0])[:, None]
        draw = torch.rand(4, len(group), generator=generator) < shares
        masks[:, group.start : group.stop] = draw
    scored = MaskScorer(model, layout=layout).score(masks, input_ids)
    assert len({round(float(loss), 4) for loss in scored[:, 0]}) == len(masks)
    for keep, losses in zip(masks, scored, strict=True):
        kept = kept_parts_of_mixtures(layout, keep)
        wanted = slow_losses(without_channels(model, kept, family == "gpt_oss"), input_ids)
        torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-5)


def test_a_router_with_few_experts_left_chooses_no_removed_one() -> None:
    """A token passes 3 experts; with 2 left, the third has weight zero."""
    model = MIXTURES["mixtral"]()
    layout = Layout.of(model)
    block = layout.decoder.experts[1]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.get_submodule(block.router).register_forward_hook(
        lambda _, __, output: seen.append(output[1:])
    )
    keep = torch.ones(1, len(layout), dtype=torch.bool)
    group = next(g for g in layout.groups if g.block is block)
    keep[0, group.start : group.start + 3] = False
    with masked(model, layout, keep):
        logits_of(model, tokens(batch=1))
    weights, chosen = seen[0]
    assert chosen.shape[1] == 3 and (weights[chosen < 3] == 0).all() and (chosen < 3).any()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))
