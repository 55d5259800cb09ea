"""Hooks of our own, marked by an attribute, do not keep the fused engine from running."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from scoring_cases import related_masks
from surgery_cases import MASKS, tokens
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_layers
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused.foreign_hooks import has_foreign_hooks
from bonsai_fast.surgery import remove_units


def with_irregular_heads() -> PreTrainedModel:
    """Pruned so that KV heads have different numbers of query heads, which takes a hook."""
    parent = FAMILIES["llama3"]()
    layout = Layout.of(parent)
    for mask in MASKS.values():
        model = remove_units(parent, layout, mask(layout))
        if any(module._forward_pre_hooks for module in model.modules()):
            return model
    raise AssertionError("no mask gives irregular heads")


@pytest.mark.parametrize(
    "build", [with_irregular_heads, lambda: stream_layers(FAMILIES["llama3"](), device="cpu")]
)
def test_our_own_hooks_are_skippable(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    assert any(module._forward_pre_hooks for module in model.modules())
    assert not has_foreign_hooks(model)
    scorer = MaskScorer(model, engine="fused")
    monkeypatch.delattr(scorer.engine, "_hooks")
    assert torch.isfinite(scorer.score(related_masks(scorer.layout)[:2], tokens())).all()


def test_a_hook_is_foreign_whatever_its_name() -> None:
    def share_kv_heads(module, inputs) -> None:
        pass

    model = FAMILIES["llama3"]()
    assert not has_foreign_hooks(model)
    for register in (
        model.model.norm.register_forward_hook,
        model.model.norm.register_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert has_foreign_hooks(model)
        handle.remove()
    handle = model.model.norm.register_forward_pre_hook(share_kv_heads)
    assert has_foreign_hooks(model)
    share_kv_heads.fused_engine_may_skip = True
    assert not has_foreign_hooks(model)
    handle.remove()
    model.model.norm.forward = model.model.norm.forward
    assert has_foreign_hooks(model)
