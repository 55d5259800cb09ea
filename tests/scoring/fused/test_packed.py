"""Packed sub-layers: what no sub-model of a call keeps costs nothing, and nobody notices."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from scoring_cases import (
    OpCalls,
    assert_errs_as_hooks,
    assert_hooks_and_pruned_agree,
)
from surgery_cases import tokens
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

import bonsai_fast as bf
from bonsai_fast.checkpoints.streaming import stream_layers
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused import split as split_module
from bonsai_fast.scoring.fused import sublayer_step
from bonsai_fast.scoring.fused.choose_route import choose, packing_pays
from bonsai_fast.scoring.fused.operands.gather import GatherOperands
from bonsai_fast.scoring.fused.operands.operands import MLPOperands
from bonsai_fast.scoring.fused.schedule import FusedWorkingSet, Schedule

ROUTES = ["pack", "tail", "split", "auto"]


def round_masks(layout: Layout, count: int = 7) -> torch.Tensor:
    """As in a round of pruning: 40 % gone from all, most of the rest kept by all, few vary.

    In layer 2, a sub-model keeps all candidates, another none, and the last one no MLP at all, in
    which alone it differs from the one before.
    """
    generator = torch.Generator().manual_seed(2)
    draw = torch.rand(len(layout), generator=generator)
    keep = (draw > 0.4).repeat(count, 1)
    varies = draw > 0.8
    keep[:, varies] = torch.rand(count, int(varies.sum()), generator=generator) < 0.5
    keep[1] = keep[0]
    # they part late, too
    keep[2, : len(layout) // 2] = keep[0, : len(layout) // 2]
    last = slice(layout.groups[-1].start, layout.groups[-1].stop)
    keep[3, last], keep[4, last] = draw[last] > 0.4, (draw[last] > 0.4) & ~varies[last]
    keep[6] = keep[5]
    keep[6, last] = False
    return keep


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models gain nothing: decide as if copies cost nothing, and narrow products little."""
    for cost in ("COPY_TOKENS", "ALONE_TOKENS"):
        monkeypatch.setattr(f"bonsai_fast.scoring.fused.choose_route.{cost}", 0.0)
    monkeypatch.setattr("bonsai_fast.scoring.fused.operands.choose_packs.FIXED_MULTIPLE", 4)


@pytest.mark.usefixtures("always", "poisoned_empty")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["llama3", "llama_bias", "qwen2", "qwen3", "gemma", "phi3"])
def test_equals_hooks_and_the_pruned_model(family: str, route: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(3)
    for attention in ("head", "kv-group"):
        layout = Layout.of(model, attention=attention)
        masks = round_masks(layout)
        scorer = MaskScorer(model, layout=layout, engine="fused", route=route)
        found = scorer.score(masks, input_ids)
        assert_hooks_and_pruned_agree(found, model, layout, masks, input_ids)
        scorer.engine.kernels = True  # their plain versions
        found = scorer.score(masks, input_ids)
        assert_hooks_and_pruned_agree(found, model, layout, masks, input_ids)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("wave", "chunk"), [(1, 1), (4, 3), (1000, 1000)])
def test_waves_and_chunks(
    wave: int, chunk: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, input_ids = FAMILIES["llama3"](), tokens(3)
    scorer = MaskScorer(model, engine="fused", route=route)
    masks = round_masks(scorer.layout)
    expected = MaskScorer(model, engine="hooks").score(masks, input_ids)
    schedule = Schedule(wave, chunk, slices=True, packs=True)
    monkeypatch.setattr(FusedWorkingSet, "schedule", lambda *_: schedule)
    torch.testing.assert_close(scorer.score(masks, input_ids), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("route", ROUTES)
def test_streamed_models_are_packed_as_well(route: str) -> None:
    model = FAMILIES["llama3"]()
    masks = round_masks(Layout.of(model))
    expected = MaskScorer(model, route=route).score(masks, tokens())
    streamed = stream_layers(FAMILIES["llama3"](), device="cpu")
    assert torch.equal(bf.MaskScorer(streamed, route=route).score(masks, tokens()), expected)


@pytest.mark.parametrize("route", ["pack", "tail", "split"])
def test_a_sublayer_that_nobody_keeps_is_skipped(route: str) -> None:
    model = FAMILIES["llama_bias"]()
    layout = Layout.of(model)
    masks = round_masks(layout)
    for group in layout.groups:
        if (group.layer, group.kind) in ((0, "channel"), (1, "head")):
            masks[:, group.start : group.stop] = False
    expected = MaskScorer(model, engine="hooks").score(masks, tokens())
    found = MaskScorer(model, route=route).score(masks, tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch):
    """Score, and collect the widths of the MLPs that are computed."""

    def collect(model: PreTrainedModel, masks: torch.Tensor, route: str) -> Counter[int]:
        seen: Counter[int] = Counter()
        inner = sublayer_step.inner

        def counting(operands, *arguments, **options):
            if isinstance(operands, MLPOperands):
                seen[len(operands.output_rows)] += 1
            return inner(operands, *arguments, **options)

        scorer = MaskScorer(model, engine="fused", route=route)
        monkeypatch.setattr(sublayer_step, "inner", counting)
        scorer.score(masks, tokens(2))
        monkeypatch.undo()
        return seen

    return collect


def test_no_more_is_computed_than_anybody_keeps(widths) -> None:
    """40 channels: 24 kept by all, 6 by some, 10 by none."""
    model = FAMILIES["llama"]()
    layout = Layout.of(model)
    masks = torch.ones(3, len(layout), dtype=torch.bool)
    for group in layout.groups:
        if group.kind == "channel":
            masks[:, group.start : group.start + 10] = False
            for number in range(3):
                masks[number, group.start + 10 + number] = False
                masks[number, group.start + 13 + 2 * number] = False
    masks[:, layout.groups[0].start] = torch.tensor([False, True, True])
    assert set(widths(model, masks, "dense")) == {40}
    assert set(widths(model, masks, "pack")) == {30}
    # two sub-models share what flows into the first MLP, and together keep all candidates
    assert widths(model, masks, "tail") == {28: 7, 30: 1}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch):
    """Score by route split, and collect (rows, channels) of every product for what all keep, and
    what each launch for candidates gathers: rows and channels of every mask in it."""

    def collect(model: PreTrainedModel, masks: torch.Tensor) -> tuple[list, list]:
        fixed: list[tuple[int, int]] = []
        gathered: list[list[tuple[int, int]]] = []
        inner, candidates = split_module.inner_of_normed, GatherOperands.inner

        def product(operands, normed, *arguments, **options):
            fixed.append((len(normed), operands.columns))
            return inner(operands, normed, *arguments, **options)

        def gather(operands, normed, positions):
            counts = operands.query.count.tolist()
            gathered.append(list(zip(operands.rows_of_mask, counts, strict=True)))
            return candidates(operands, normed, positions)

        scorer = MaskScorer(model, engine="fused", route="split")
        monkeypatch.setattr(split_module, "inner_of_normed", product)
        monkeypatch.setattr(GatherOperands, "inner", gather)
        scorer.score(masks, tokens(2))
        monkeypatch.undo()
        return fixed, gathered

    return collect


def test_one_product_for_what_all_keep_and_lists_for_the_rest(
    parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 channels: 24 kept by all that have the MLP, 6 by some, 10 by none; 2 sequences."""
    monkeypatch.setattr("bonsai_fast.scoring.fused.operands.choose_packs.FIXED_MULTIPLE", 10)
    model = FAMILIES["llama"]()
    layout = Layout.of(model)
    masks = torch.ones(4, len(layout), dtype=torch.bool)
    heads, first, *_, last = layout.groups
    masks[:, heads.start : heads.start + 4] = ~torch.eye(4, dtype=torch.bool)
    for number in range(4):
        masks[number, first.start + 2 * number] = False
    masks[:, last.start : last.start + 10] = False
    masks[0, last.start + 10 : last.start + 16] = False
    masks[1, last.start + 10] = masks[2, last.start + 11 : last.start + 13] = False
    masks[3, last.start : last.stop] = False
    fixed, gathered = parts(model, masks)
    # the MLP between them has no candidates, and is no packed one
    assert fixed == [(8, 30), (6, 20)]
    # of those that all keep, 6 and 4 are gathered, so that 10 divides the others
    assert gathered == [[(2, 9)] * 4, [(2, 4), (2, 9), (2, 8)]]


def test_what_submodels_share_is_one_product_where_they_part(
    parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bonsai_fast.scoring.fused.operands.choose_packs.FIXED_MULTIPLE", 1)
    model = FAMILIES["llama"]()
    layout = Layout.of(model)
    masks = torch.ones(3, len(layout), dtype=torch.bool)
    for number in range(3):
        masks[number, layout.groups[1].start : layout.groups[1].start + number] = False
    fixed, gathered = parts(model, masks)
    assert fixed == [(2, 38)]
    assert sorted(gathered) == [[(2, 0)], [(2, 1)], [(2, 2)]]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("route", [*ROUTES, "gather"])
@pytest.mark.parametrize("biased", ["gate_proj", "up_proj"])
def test_one_of_gate_and_up_has_a_bias(biased: str, route: str) -> None:
    model = FAMILIES["llama3"]()
    for layer in model.model.layers:
        getattr(layer.mlp, biased).bias = torch.nn.Parameter(torch.linspace(-1, 1, 40))
    masks = round_masks(Layout.of(model))
    expected = MaskScorer(model, engine="hooks").score(masks, tokens())
    found = MaskScorer(model, engine="fused", route=route).score(masks, tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("always")
def test_an_activation_that_no_kernel_has_is_packed_alone() -> None:
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN["quick_gelu"]
    masks = round_masks(Layout.of(model))
    with OpCalls() as calls:
        found = MaskScorer(model, engine="fused", route="split").score(masks, tokens())
    assert not calls.counts["kept_up_proj"]
    expected = MaskScorer(model, engine="hooks").score(masks, tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_low_precision_errs_as_hooks_do(route: str, dtype: torch.dtype) -> None:
    model = FAMILIES["llama_bias"]()
    assert_errs_as_hooks(model, round_masks(Layout.of(model)), tokens(), route, dtype)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kept_by", ["some", "all", "none"])
def test_a_poisoned_channel_spoils_only_those_that_keep_it(kept_by: str, route: str) -> None:
    model, input_ids = FAMILIES["llama3"](), tokens()
    layout = Layout.of(model)
    masks = round_masks(layout)
    group = next(g for g in layout.groups if g.layer == 1 and g.kind == "channel")
    count = masks[:, group.start : group.stop].sum(dim=0)
    most = len(masks)
    wanted = {"some": (count > 0) & (count < most), "all": count == most, "none": count == 0}
    channel = int(wanted[kept_by].nonzero()[0])
    spoilt = masks[:, group.start + channel]
    clean = MaskScorer(model, layout=layout, engine="hooks").score(masks, input_ids)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[channel] = float("nan")
    found = MaskScorer(model, layout=layout, route=route).score(masks, input_ids)
    assert not torch.isfinite(found[spoilt]).any()
    torch.testing.assert_close(found[~spoilt], clean[~spoilt], rtol=0, atol=1e-4)


def test_policy_packs_where_that_is_cheaper() -> None:
    """30 % gone from all, 5 % more from each: one copy for 16 sub-models, or none for one."""
    kept, used, fixed = 0.66, 0.7, 0.63
    assert packing_pays("auto", [kept] * 16, used, fixed, 512, 1)
    assert not packing_pays("auto", [1.0] * 16, 1.0, 1.0, 4096, 1)
    assert not packing_pays("auto", [kept] * 2, used, fixed, 4, 1)
    assert choose("auto", kept / used, 4096, copied_share=0.05) == "slice"
    assert choose("auto", kept / used, 128, copied_share=0.05) == "dense"
    assert not packing_pays("dense", [kept] * 16, used, fixed, 4096, 1)
    assert not packing_pays("pack", [0.9], 1.0, 0.5, 4096, 1)
    assert packing_pays("tail", [0.9], 1.0, 0.5, 1, 1)
    assert packing_pays("split", [0.9], 1.0, 0.5, 1, 1)
    assert packing_pays("split", [0.5], 0.5, 0.5, 1, 1)
    # nothing is gone from all, and all or nothing is a candidate
    assert not packing_pays("split", [0.9], 1.0, 0.0, 1, 1)
    assert not packing_pays("split", [1.0], 1.0, 1.0, 1, 1)


def test_a_packed_sublayer_must_fit_into_the_budget() -> None:
    scorer = MaskScorer(FAMILIES["llama3"](), engine="fused")
    needs = FusedWorkingSet.of(scorer.layout, scorer.engine.nll, 12)
    needs = replace(needs, logits=0, hidden=0)
    assert needs.schedule(2**30).packs
    both = needs.slices + needs.pack
    assert not needs.schedule(2 * both - 2).packs and needs.schedule(2 * both - 2).slices
