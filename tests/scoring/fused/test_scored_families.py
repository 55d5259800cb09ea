"""Families whose layers are arranged unlike LLaMA's: the fused engine equals the hooks engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compensated_cases import Refit
from scored_families import (
    SCORED_FAMILIES,
    cohere,
    cohere2,
    gemma2,
    gemma3,
    glm4,
    granite,
    ministral3,
    smollm3,
)
from scoring_cases import OpCalls, assert_errs_as_hooks, related_masks, scorer_on_ops
from surgery_cases import MASKS, tokens
from transformers import PreTrainedModel
from zoo import tiny_model

from bonsai_fast.checkpoints.streaming import stream_layers
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused.read_parent import read_structure
from bonsai_fast.scoring.fused.schedule import FusedWorkingSet, Schedule
from bonsai_fast.scoring.hooks_engine import masked
from bonsai_fast.surgery import remove_units

ROUTES = ["dense", "slice", "gather", "pack", "tail", "split"]
# heads that the kernels do not turn or normalise run densely
DENSE_HEADS = {"cohere", "glm4", "olmo2"}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models gain nothing: decide as if copies cost nothing."""
    for cost in ("COPY_TOKENS", "ALONE_TOKENS"):
        monkeypatch.setattr(f"bonsai_fast.scoring.fused.choose_route.{cost}", 0.0)


def scored_by_hooks(model: PreTrainedModel, layout: Layout, masks: torch.Tensor) -> torch.Tensor:
    return MaskScorer(model, layout=layout, engine="hooks").score(masks, tokens(3))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_equals_hooks_by_every_route(family: str) -> None:
    """With ops and without them."""
    model = SCORED_FAMILIES[family]()
    layout = Layout.of(model, sublayers=True)
    masks = related_masks(layout)
    expected = scored_by_hooks(model, layout, masks)
    for route in ROUTES:
        scorer = MaskScorer(model, layout=layout, engine="fused", route=route)
        with OpCalls() as calls:
            assert_same(scorer.score(masks, tokens(3)), expected)
        if route == "gather":
            assert calls.counts["kept_up_proj"]
            assert bool(calls.counts["kept_head_proj"]) == (family not in DENSE_HEADS)
        on_ops = scorer_on_ops(model, layout, route)
        assert_same(on_ops.score(masks, tokens(3)), expected)


@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_waves_and_chunks_do_not_change_the_answer(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SCORED_FAMILIES[family]()
    layout = Layout.of(model, sublayers=True)
    masks = related_masks(layout)
    expected = scored_by_hooks(model, layout, masks)
    schedule = Schedule(7, 2, slices=True, packs=True)
    monkeypatch.setattr(FusedWorkingSet, "schedule", lambda *_: schedule)
    for route in ("slice", "gather", "split"):
        scorer = MaskScorer(model, layout=layout, route=route)
        assert_same(scorer.score(masks, tokens(3)), expected)


@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_parents_that_were_pruned_before(family: str) -> None:
    """Whether or not the norms of a removed sub-layer were left."""
    parent = SCORED_FAMILIES[family]()
    layout = Layout.of(parent)
    for mask in ("few", "first attention gone"):
        model = remove_units(parent, layout, MASKS[mask](layout))
        masks = related_masks(Layout.of(model))[::3]
        expected = scored_by_hooks(model, Layout.of(model), masks)
        assert_same(MaskScorer(model, engine="fused").score(masks, tokens(3)), expected)


@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_own_output_projections(family: str) -> None:
    """Also of sub-layers that keep nothing but the bias, behind which there may be a norm."""
    model = SCORED_FAMILIES[family]()
    layout = Layout.of(model, sublayers=True)
    masks = related_masks(layout)[:9]
    refit = Refit(model)
    hooks = MaskScorer(model, layout=layout, engine="hooks")
    expected = hooks.score(masks, tokens(3), output_weights=refit)
    for route in ("dense", "slice", "gather", "tail"):
        scorer = MaskScorer(model, layout=layout, engine="fused", route=route)
        assert_same(scorer.score(masks, tokens(3), output_weights=refit), expected)


@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_divergence_and_streaming(family: str) -> None:
    model = SCORED_FAMILIES[family]()
    layout = Layout.of(model, sublayers=True)
    masks = related_masks(layout)
    scorer, hooks = (MaskScorer(model, layout=layout, engine=e) for e in ("fused", "hooks"))
    expected = hooks.divergence(masks, tokens(3))
    found = scorer.divergence(masks, tokens(3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    streamed = stream_layers(SCORED_FAMILIES[family](), device="cpu")
    found = MaskScorer(streamed, layout=layout, engine="fused").score(masks, tokens(3))
    assert torch.equal(found, scorer.score(masks, tokens(3)))


@pytest.mark.parametrize("logit_bytes", [2**20, 1])
def test_divergence_of_capped_logits(logit_bytes: int) -> None:
    """In one chunk of tokens and in many, against all logits of both models."""
    model, input_ids = gemma2(), tokens(3)
    scorer = MaskScorer(model)
    scorer._nll._logit_bytes = logit_bytes
    masks = related_masks(scorer.layout)[:4]
    masks[0] = True
    found = scorer.divergence(masks, input_ids)
    with torch.no_grad():
        log_p = model(input_ids=input_ids).logits[:, :-1].double().log_softmax(-1)
        for keep, divergence in zip(masks, found, strict=True):
            with masked(model, scorer.layout, keep.expand(3, -1)):
                log_q = model(input_ids=input_ids).logits[:, :-1].double().log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
            torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)
    assert found[0].abs().max() < 1e-5 < found[1:].min()


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "granite", "cohere"])
def test_low_precision_errs_as_hooks_do(family: str) -> None:
    model = SCORED_FAMILIES[family]()
    masks = related_masks(Layout.of(model))
    assert_errs_as_hooks(model, masks, tokens(), "slice", torch.bfloat16)


@pytest.mark.parametrize(
    ("build", "changed"),
    [
        (gemma2, {"attn_logit_softcapping": None}),
        (gemma2, {"final_logit_softcapping": None}),
        (gemma2, {"query_pre_attn_scalar": 30}),
        (gemma2, {"sliding_window": 30}),
        (gemma3, {"sliding_window": 30}),
        (gemma3, {"layer_types": ["full_attention"] * 3}),
        (granite, {"embedding_multiplier": 1.0}),
        (granite, {"attention_multiplier": 1.0}),
        (granite, {"residual_multiplier": 1.0}),
        (granite, {"logits_scaling": 1.0}),
        (smollm3, {"no_rope_layers": [1, 1, 1]}),
        (smollm3, {"layer_types": ["full_attention"] * 3}),
        (cohere, {"logit_scale": 1.0}),
        (cohere2, {"sliding_window": 30}),
        (cohere2, {"layer_types": ["sliding_attention"] * 3}),
        (ministral3, {"original_max_position_embeddings": 64}),
        (glm4, {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 100.0}}),
    ],
)
def test_what_makes_the_families_special_matters(
    build: Callable[..., PreTrainedModel], changed: dict[str, object]
) -> None:
    """Or the cases above would prove nothing; the changed model is followed, too."""
    losses = []
    for options in ({}, changed):
        model = build(**options)
        layout = Layout.of(model)
        masks = related_masks(layout)[:3]
        losses.append(MaskScorer(model, engine="fused").score(masks, tokens(3)))
        assert_same(losses[-1], scored_by_hooks(model, layout, masks))
    assert float((losses[0] - losses[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        *("apertus", "arcee", "ernie4_5", "exaone4", "gemma3", "glm", "helium", "hyperclovax"),
        "hunyuan_v1_dense",
        *("jais2", "nemotron", "olmo", "olmo3", "seed_oss", "stablelm", "starcoder2"),
        "vaultgemma",
    ],
)
def test_others_are_read_likewise(name: str) -> None:
    model = tiny_model(name).eval()
    layout = Layout.of(model, sublayers=True)
    masks = related_masks(layout)[::3]
    expected = scored_by_hooks(model, layout, masks)
    for route in ("slice", "gather"):
        scorer = MaskScorer(model, layout=layout, engine="fused", route=route)
        assert_same(scorer.score(masks, tokens(3)), expected)


def test_layers_are_described_one_by_one() -> None:
    model = gemma3()
    structure = read_structure(model, Layout.of(model))
    attention = structure.sublayers[::2]
    assert [each.window for each in attention] == [5, 5, None]
    kinds = [each.rotary.kind for each in attention]
    assert kinds == ["sliding_attention", "sliding_attention", "full_attention"]
    rotary = [
        each.rotary for each in read_structure(smollm3(), Layout.of(smollm3())).sublayers[::2]
    ]
    assert [each is None for each in rotary] == [False, True, False]
