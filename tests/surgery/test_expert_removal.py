"""Removed experts: the smaller model equals the masked parent, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES, STORED_DIFFERENTLY
from surgery_cases import difference, logits_of, tokens
from transformers import AutoModelForCausalLM

from bonsai_fast.models import ExpertsBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import masked
from bonsai_fast.surgery import kept_positions, remove_units, save_pretrained


def keep_experts(layout: Layout, count: int) -> torch.Tensor:
    """Other experts of every layer, equally many."""
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if group.kind == "expert":
            order = torch.randperm(
                len(group), generator=torch.Generator().manual_seed(group.layer + 1)
            )
            keep[group.start + order[count:]] = False
    return keep


@pytest.mark.parametrize("family, count", [*((family, 2) for family in MIXTURES), ("mixtral", 4)])
def test_equal_counts_stay_in_the_stock_class(family: str, count: int) -> None:
    """Fewer than the 3 that a token passes: then it passes fewer."""
    model, input_ids = MIXTURES[family](), tokens()
    layout = Layout.of(model)
    keep = keep_experts(layout, count)
    smaller = remove_units(model, layout, keep)
    assert type(smaller) is type(model)
    assert smaller.config.num_experts_per_tok == min(3, count)
    with masked(model, layout, keep.expand(len(input_ids), -1)):
        wanted = logits_of(model, input_ids)
    assert difference(logits_of(smaller, input_ids), wanted) < 1e-5 * float(wanted.abs().max())
    removed = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in smaller.parameters()
    )
    assert removed == layout.num_removed_parameters(keep)
    again = Layout.of(smaller)
    assert all(block.num_experts == count for block in again.decoder.experts.values())
    experts = [layer["experts"] for layer in kept_positions(layout, keep) if "experts" in layer]
    assert all(len(kept) == count for kept in experts) and len(experts) == len(
        layout.decoder.experts
    )


@pytest.mark.parametrize("family", STORED_DIFFERENTLY)
def test_equal_widths_of_experts_stay_in_the_stock_class(family: str) -> None:
    """Where the width of shared experts follows from that of the others, in a bonsai class."""
    model, input_ids = MIXTURES[family](), tokens()
    layout = Layout.of(model, experts="channel")
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if isinstance(group.block, ExpertsBlock):
            gone = torch.randperm(len(group), generator=torch.Generator().manual_seed(group.layer))
            keep[group.start + gone[:4]] = False
    smaller = remove_units(model, layout, keep)
    assert (type(smaller) is type(model)) == (family != "glm4_moe")
    with masked(model, layout, keep.expand(len(input_ids), -1)):
        wanted = logits_of(model, input_ids)
    assert difference(logits_of(smaller, input_ids), wanted) < 1e-5 * float(wanted.abs().max())
    removed = model.num_parameters() - smaller.num_parameters()
    assert removed == layout.num_removed_parameters(keep)


def test_widths_that_grouped_products_cannot_have_are_refused() -> None:
    model = MIXTURES["mixtral"]()
    layout = Layout.of(model, experts="channel")
    keep = torch.ones(len(layout), dtype=torch.bool)
    keep[next(g.start for g in layout.groups if g.kind == "channel" and g.layer == 2)] = False
    with pytest.raises(ValueError, match=r"layer 2: expected a multiple of 8 channels .* got 19"):
        remove_units(model, layout, keep)


def uneven(layout: Layout) -> torch.Tensor:
    """Other numbers of experts or channels in each mixture, none in the last one."""
    keep = torch.ones(len(layout), dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    mixtures = [g for g in layout.groups if isinstance(g.block, ExpertsBlock)]
    for group in layout.groups:
        order = torch.randperm(len(group), generator=generator)
        if group is mixtures[-1]:
            keep[group.start : group.stop] = False
        elif group in mixtures[1:]:
            keep[group.start + order[2 if group.kind == "expert" else 8 :]] = False
    return keep


@pytest.mark.parametrize(
    "family, experts",
    [
        *((family, "expert") for family in MIXTURES),
        *((family, "channel") for family in STORED_DIFFERENTLY),
    ],
)
def test_uneven_mixtures_saved_and_loaded(family: str, experts: str, tmp_path: Path) -> None:
    """What was cut can be cut again, also in the other way."""
    model, input_ids = MIXTURES[family](), tokens(batch=3)
    layout = Layout.of(model, experts=experts)
    keep = uneven(layout)
    with masked(model, layout, keep.expand(len(input_ids), -1)):
        wanted = logits_of(model, input_ids)
    smaller = remove_units(model, layout, keep)
    assert type(smaller).__name__ == f"Bonsai{type(model).__name__}"
    tolerance = 1e-5 * float(wanted.abs().max())
    assert difference(logits_of(smaller, input_ids), wanted) < tolerance
    assert model.num_parameters() - smaller.num_parameters() == layout.num_removed_parameters(keep)
    save_pretrained(smaller, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert difference(logits_of(loaded, input_ids), wanted) < tolerance
    assert torch.equal(
        loaded.generate(input_ids, max_new_tokens=4, do_sample=False, use_cache=True),
        loaded.generate(input_ids, max_new_tokens=4, do_sample=False, use_cache=False),
    )
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| experts | channels in each expert |" in card
    again = Layout.of(loaded, experts="channel" if experts == "expert" else "expert")
    less = torch.ones(len(again), dtype=torch.bool)
    for group in again.groups:
        if isinstance(group.block, ExpertsBlock):
            kept = 2 if group.kind == "expert" else 8
            less[group.start + kept : group.stop] = False
    with masked(loaded, again, less.expand(len(input_ids), -1)):
        wanted = logits_of(loaded, input_ids)
    twice = remove_units(loaded, again, less)
    assert difference(logits_of(twice, input_ids), wanted) < tolerance
