"""Own output projections in the fused engine: every route, cut anywhere, made when needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compensated_cases import Refit
from families import FAMILIES
from scoring_cases import OpCalls, related_masks, wide_heads
from surgery_cases import tokens
from test_eight_bits import anew
from test_packed import round_masks
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_layers
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer, OutputProjection
from bonsai_fast.scoring.fused.own_outputs import OwnOutputs
from bonsai_fast.scoring.fused.schedule import FusedWorkingSet, Schedule

ROUTES = ["dense", "slice", "gather", "pack", "tail", "auto"]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models gain nothing: decide as if copies cost nothing."""
    for cost in ("COPY_TOKENS", "ALONE_TOKENS", "QUANTISE_TOKENS"):
        monkeypatch.setattr(f"bonsai_fast.scoring.fused.choose_route.{cost}", 0.0)


def use_schedule(monkeypatch: pytest.MonkeyPatch, *, wave: int, chunk: int, held: int) -> None:
    schedule = Schedule(wave, chunk, slices=True, packs=True, held_outputs=held)
    monkeypatch.setattr(FusedWorkingSet, "schedule", lambda *_: schedule)


def of_hooks(
    model: PreTrainedModel, masks: torch.Tensor, input_ids: torch.Tensor, layout: Layout
) -> torch.Tensor:
    scorer = MaskScorer(model, layout=layout, engine="hooks")
    return scorer.score(masks, input_ids, output_weights=Refit(model))


@pytest.mark.usefixtures("always", "poisoned_empty")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "phi3"])
def test_every_route_equals_hooks(family: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layouts of a pack and a slice, with kernels and without, in chunks of two rows."""
    model, input_ids = wide_heads(family), tokens(3)
    layout = Layout.of(model, attention="kv-group" if family == "phi3" else "head", sublayers=True)
    masks = torch.cat([round_masks(layout), related_masks(layout)[1:4]])
    expected = of_hooks(model, masks, input_ids, layout)
    scorer = MaskScorer(model, layout=layout, route=route)
    for kernels in (False, True):
        scorer.engine.kernels = kernels  # their plain versions
        with OpCalls() as calls:
            found = scorer.score(masks, input_ids, output_weights=Refit(model))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (calls.counts["kept_up_proj"] > 0) == (route == "gather")
        assert not calls.counts["kept_down_proj"]
        use_schedule(monkeypatch, wave=1000, chunk=2, held=3)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("wave", "chunk", "held"), [(1, 1, 1), (7, 2, 1), (9, 3, 2), (99, 99, 99)])
def test_waves_chunks_and_memory_do_not_change_the_answer(
    wave: int, chunk: int, held: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, input_ids = wide_heads("llama3"), tokens(5)
    layout = Layout.of(model)
    masks = related_masks(layout)[:9]
    expected = of_hooks(model, masks, input_ids, layout)
    use_schedule(monkeypatch, wave=wave, chunk=chunk, held=held)
    sizes: list[int] = []
    make = OwnOutputs._make

    def counting(own: OwnOutputs, mask: int):
        sizes.append(len(own._made) + 1)
        return make(own, mask)

    monkeypatch.setattr(OwnOutputs, "_make", counting)
    found = MaskScorer(model, route=route).score(masks, input_ids, output_weights=Refit(model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert max(sizes) <= held and (held == 1 or max(sizes) > 1)


@pytest.mark.parametrize("route", ["dense", "slice"])
def test_made_once_for_all_that_share_a_mask(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if states differ before it, if sub-models are equal, and if rows come in chunks."""
    model, refit = FAMILIES["llama3"](), Refit(FAMILIES["llama3"]())
    layout = Layout.of(model)
    masks = related_masks(layout)
    use_schedule(monkeypatch, wave=1000, chunk=2, held=16)
    MaskScorer(model, route=route).score(masks, tokens(5), output_weights=refit)
    different = {
        (block.output, row.numpy().tobytes())
        for block, kept in layout.keep_by_block(masks)
        for row in kept
        if not row.all()
    }
    assert set(refit.made) == different and set(refit.made.values()) == {1}


@pytest.mark.parametrize("engine", ["fused", "hooks"])
def test_streamed_models_give_the_same_bits(engine: str) -> None:
    """The function finds the layer's own weights in memory."""
    model = FAMILIES["llama3"]()
    streamed = stream_layers(FAMILIES["llama3"](), device="cpu")

    def halved(parent: PreTrainedModel):
        def make(block, keep_parts):
            weight = parent.get_submodule(block.output).weight
            assert weight.device.type == "cpu"
            return OutputProjection(0.5 * weight[:, keep_parts.repeat_interleave(block.part_width)])

        return make

    masks = round_masks(Layout.of(model))
    expected, found = (
        MaskScorer(each, engine=engine).score(masks, tokens(), output_weights=halved(each))
        for each in (model, streamed)
    )
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("always", "poisoned_empty")
@pytest.mark.parametrize("route", ["dense", "slice", "pack", "tail"])
def test_products_in_8_bits_use_the_own_weights(route: str) -> None:
    model = FAMILIES["llama_bias"]()
    scorers = [MaskScorer(model, route=route, precision="int8") for _ in range(2)]
    scorers[0].engine._multiply = anew
    masks = round_masks(scorers[0].layout)
    expected, found = (
        scorer.score(masks, tokens(3), output_weights=Refit(model)) for scorer in scorers
    )
    assert torch.equal(found, expected)
    full = of_hooks(model, masks, tokens(3), scorers[0].layout)
    assert 0 < (found - full).abs().max() < 0.2


@pytest.mark.parametrize("route", ["dense", "slice", "gather"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_unit_spoils_only_those_that_keep_it(poison: float, route: str) -> None:
    model = wide_heads("llama3")
    layout = Layout.of(model)
    masks = related_masks(layout)
    group = next(g for g in layout.groups if g.layer == 1 and g.kind == "channel")
    spoilt = masks[:, group.start + 3]
    clean = of_hooks(model, masks, tokens(), layout)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = poison
    for engine, options in (("fused", {"route": route}), ("hooks", {})):
        scorer = MaskScorer(model, layout=layout, engine=engine, **options)
        scored = scorer.score(masks, tokens(), output_weights=Refit(model))
        assert not torch.isfinite(scored[spoilt]).any()
        torch.testing.assert_close(scored[~spoilt], clean[~spoilt], rtol=0, atol=1e-4)


def test_a_route_that_has_no_way_is_refused_before_any_work() -> None:
    model = FAMILIES["llama3"]()
    scorer = MaskScorer(model, route="split")
    with pytest.raises(ValueError, match="route split does not support output_weights") as caught:
        scorer.session(tokens(), output_weights=Refit(model))
    assert "\n" not in str(caught.value)


def test_memory_for_projections_is_reserved() -> None:
    model = FAMILIES["llama3"]()
    scorer = MaskScorer(model)
    needs = [
        FusedWorkingSet.of(scorer.layout, scorer.engine.nll, 12, own_outputs=own)
        for own in (False, True)
    ]
    plain, own = (replace(each, logits=0, hidden=0) for each in needs)
    # D times the columns of the widest output projection, in float32
    assert plain.output == 0 and own.output >= 4 * 48 * 60
    assert own.least_budget >= plain.least_budget + 3 * own.output
    budget = 2 * own.least_budget
    without, schedule = plain.schedule(budget), own.schedule(budget)
    assert without is not None and schedule is not None
    assert schedule.held_outputs == 1 and schedule.wave_rows < without.wave_rows
    roomy = own.schedule(10**9)
    assert roomy is not None and roomy.held_outputs == 16
