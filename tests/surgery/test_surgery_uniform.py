"""Results of remove_units with equal widths are stock models, where the class can say so."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from surgery_cases import TOLERANCE, difference, logits_of, masked_logits, tokens

from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_results_are_stock_where_the_family_can_say_so(family: str) -> None:
    model = FAMILIES[family]()
    layout = Layout.of(model, attention="kv-group")
    keep = torch.tensor([unit.kind != "channel" or unit.index % 4 != 0 for unit in layout])
    child = remove_units(model, layout, keep)
    assert (child.config.model_type == model.config.model_type) == ("bloom" not in family)
    expected = masked_logits(model, layout, keep, tokens())
    assert difference(logits_of(child, tokens()), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "model_type"),
    [
        ("llama3", "bonsai_llama"),
        ("qwen2", "qwen2"),
        ("phi", "phi"),
        ("gpt_neox", "bonsai_gpt_neox"),
    ],
)
def test_uniform_heads(family: str, model_type: str) -> None:
    """GPT-NeoX derives the width of a head from their number, LLaMA wants whole groups."""
    model = FAMILIES[family]()
    layout = Layout.of(model)
    gone = (0, 3) if family == "qwen2" else (0,)
    keep = torch.tensor([unit.kind != "head" or unit.index not in gone for unit in layout])
    child = remove_units(model, layout, keep)
    assert child.config.model_type == model_type
    expected = masked_logits(model, layout, keep, tokens())
    assert difference(logits_of(child, tokens()), expected) < TOLERANCE


def test_pruning_to_uniform_in_two_steps_gives_the_stock_model() -> None:
    model = FAMILIES["qwen3"]()
    layout = Layout.of(model)
    channels = torch.tensor(
        [unit.kind != "channel" or unit.layer > 0 or unit.index < 30 for unit in layout]
    )
    first = remove_units(model, layout, channels)
    assert first.config.model_type == "bonsai_qwen3"
    layout = Layout.of(first)
    keep = torch.tensor([unit.kind != "channel" or unit.index < 30 for unit in layout])
    second = remove_units(first, layout, keep)
    assert type(second) is type(model)
    assert second.config.intermediate_size == 30
    expected = masked_logits(first, layout, keep, tokens())
    assert difference(logits_of(second, tokens()), expected) < TOLERANCE
