"""One-shot methods: their metrics against slow truths, and the bias that FLAP adds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from searches import new_search
from surgery_cases import tokens, without_attention
from test_statistics import inputs_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from bonsai_fast.methods import Search
from bonsai_fast.methods.allocation import (
    equal_shares,
    select_units,
    spare_layers,
    standardised,
)
from bonsai_fast.methods.importance.coupled import coupled_importance
from bonsai_fast.methods.importance.prior import column_importance
from bonsai_fast.methods.importance.statistics import collect_statistics
from bonsai_fast.methods.units.flap import Flap
from bonsai_fast.methods.units.layerwise import layer_losses
from bonsai_fast.methods.units.one_shot import magnitude
from bonsai_fast.methods.units.taylor import first_order_importance
from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer, SequenceNLL
from bonsai_fast.surgery import remove_units, save_pretrained, verify_saved

NewSearch = Callable[..., Search]
SOME = ["llama3", "phi3", "opt", "bloom", "gpt_neox", "qwen2"]


@pytest.fixture
def search_of(tmp_path: Path) -> NewSearch:
    numbers = iter(range(9))
    return lambda model, **options: new_search(model, tmp_path / f"run-{next(numbers)}", **options)


def weight_lost(model: PreTrainedModel, layout: Layout, unit: int) -> float:
    """Sum of |w| that goes when a unit is cut out for real."""
    keep = torch.ones(len(layout), dtype=torch.bool)
    keep[unit] = False
    smaller = remove_units(model, layout, keep)
    sums = [
        sum(float(p.detach().double().abs().sum()) for p in m.parameters())
        for m in (model, smaller)
    ]
    return sums[0] - sums[1]


def some_units(layout: Layout) -> Iterator[int]:
    for group in layout.groups:
        yield from (group.start, group.stop - 1)


@pytest.mark.parametrize("family", SOME)
def test_magnitude_is_what_a_real_cut_takes_away(family: str, search_of: NewSearch) -> None:
    search = search_of(FAMILIES[family](), attention="kv-group")
    layout = search.task.layout
    l1, l2 = magnitude(search, power=1), magnitude(search, power=2)
    squared = copy.deepcopy(search.task.model)
    with torch.no_grad():
        for parameter in squared.parameters():
            parameter.square_()
    for unit in some_units(layout):
        assert float(l1[unit]) == pytest.approx(weight_lost(search.task.model, layout, unit), 1e-4)
        assert float(l2[unit]) == pytest.approx(weight_lost(squared, layout, unit), 1e-4)


def test_query_heads_share_what_their_kv_head_is_worth(search_of: NewSearch) -> None:
    model = FAMILIES["llama3"]()
    by_head = magnitude(search_of(model, attention="head"), power=1)
    by_group = magnitude(search_of(model, attention="kv-group"), power=1)
    heads, groups = Layout.of(model), Layout.of(model, attention="kv-group")
    for few, many in zip(groups.groups, heads.groups, strict=True):
        if few.kind == "kv-group":
            sums = torch.zeros(len(few), dtype=torch.float64).index_add_(
                0, few.part_of_unit, by_head[many.start : many.stop]
            )
            torch.testing.assert_close(sums, by_group[few.start : few.stop])


def test_the_largest_structure_counts() -> None:
    model = FAMILIES["llama3"]()
    layout = Layout.of(model, attention="kv-group")
    found = coupled_importance(
        layout,
        lambda cut: model.get_parameter(cut.parameter).detach().abs().sum(dim=1 - cut.dim),
        reduction="max",
    )
    group = next(group for group in layout.groups if group.kind == "channel")
    mlp = model.get_submodule(group.block.output.removesuffix(".down_proj"))
    sums = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
    expected = torch.stack([weight.abs().sum(dim=1) for weight in sums]).amax(dim=0)
    torch.testing.assert_close(found[group.start : group.stop], expected.double())
    with pytest.raises(ValueError, match="expected one of"):
        coupled_importance(layout, lambda cut: cut.owner.float(), reduction="min")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or Inf"):
        coupled_importance(layout, lambda cut: cut.owner * float("nan"), reduction="sum")


@pytest.mark.parametrize("family", ["llama3", "phi3", "opt", "bloom"])
def test_taylor_is_weight_times_gradient(family: str) -> None:
    """Truth: put |w dL/dw| in the place of the weights, and see what a cut takes away."""
    model, input_ids = FAMILIES[family](), tokens(3)
    layout = Layout.of(model, attention="kv-group")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mine = torch.ones_like(model.get_input_embeddings().weight)
    model.get_input_embeddings().weight.grad = mine
    found = first_order_importance(model, layout, input_ids)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.get_input_embeddings().weight.grad is mine
    others = [p for p in model.parameters() if p is not model.get_input_embeddings().weight]
    assert all(p.grad is None and p.requires_grad for p in others)

    truth = copy.deepcopy(model)
    truth.zero_grad()
    sum(truth(input_ids=row[None], labels=row[None]).loss for row in input_ids).div(3).backward()
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.copy_((parameter * parameter.grad).abs())
    for unit in some_units(layout):
        assert float(found[unit]) == pytest.approx(weight_lost(truth, layout, unit), 2e-3)


def test_equal_shares_thin_out_every_group_alike() -> None:
    layout = Layout.of(FAMILIES["llama3"]())
    importance = torch.rand(len(layout), generator=torch.Generator().manual_seed(0))
    level = equal_shares(layout, importance) / layout.num_parameters_per_unit
    for share in (0.1, 0.25, 0.5, 0.9):
        for group in layout.groups:
            inside = slice(group.start, group.stop)
            gone = level[inside] <= share + 1e-12
            assert int(gone.sum()) == int(share * len(group) + 1e-9)
            if gone.any() and not gone.all():
                assert importance[inside][gone].max() < importance[inside][~gone].min()


def test_spared_layers_go_last() -> None:
    layout = Layout.of(FAMILIES["llama3"]())
    plain = equal_shares(layout, torch.arange(len(layout)).float())
    spared = spare_layers(layout, plain, first=1, last=1)
    everything = torch.ones(len(layout), dtype=torch.bool)
    little, much = (
        select_units(
            layout,
            spared,
            everything,
            budget=int(share * layout.num_decoder_parameters),
            order="relevance_per_parameter",
        )
        for share in (0.2, 0.7)
    )
    for group in layout.groups:
        inside = slice(group.start, group.stop)
        if group.layer == 1:
            assert not little[inside].all() and not much[inside].any()
        else:
            assert little[inside].all() and not much[inside].all()


@pytest.mark.parametrize("family", ["llama3", "opt"])
def test_fluctuation_and_standardisation(family: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(5)
    layout = Layout.of(model)
    scorer = MaskScorer(model, layout=layout)
    everything = torch.ones(len(layout), dtype=torch.bool)
    statistics = collect_statistics(scorer, everything, input_ids)
    columns = column_importance("fluctuation", model, layout, statistics)
    levels = torch.empty(len(layout), dtype=torch.float64)
    for group in layout.groups:
        block = group.block
        weight = model.get_submodule(block.output).weight.detach().double()
        seen = inputs_of(model, block, input_ids)
        expected = seen.var(dim=0) * weight.norm(dim=0) ** 2
        torch.testing.assert_close(columns[block.output], expected, rtol=1e-4, atol=1e-9)
        scores = (expected - expected.mean()) / expected.std()
        width = block.head_dim if isinstance(block, AttentionBlock) else 1
        levels[group.start : group.stop] = scores.view(-1, width).mean(dim=1)
    relevance = standardised(layout, columns) / layout.num_parameters_per_unit
    torch.testing.assert_close(relevance, levels - levels.min(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_gives_what_the_removed_columns_gave_on_average(
    family: str, search_of: NewSearch, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    search = search_of(model, attention="head")
    layout, input_ids = search.task.layout, search.task.calibration.input_ids
    keep = without_attention(1)(layout)
    smaller = remove_units(model, layout, keep)
    before = {name: p.detach().clone() for name, p in smaller.named_parameters()}
    Flap().compensate(search, smaller, keep)
    for block, kept in layout.keep_by_block(keep):
        projection, seen = model.get_submodule(block.output), inputs_of(model, block, input_ids)
        width = block.head_dim if isinstance(block, AttentionBlock) else 1
        kept = kept.repeat_interleave(width)
        weight = projection.weight.detach().double()
        mean = (seen @ weight.T).mean(dim=0)
        old = 0 if projection.bias is None else projection.bias.detach().double()
        bias = smaller.get_submodule(block.output).bias.detach().double()
        torch.testing.assert_close(
            (seen[:, kept] @ weight[:, kept].T).mean(dim=0) + bias, mean + old, rtol=1e-4, atol=1e-4
        )
    for name, parameter in smaller.named_parameters():
        if name in before and not name.endswith("bias"):
            assert torch.equal(before[name], parameter)

    save_pretrained(smaller, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.num_parameters() == smaller.num_parameters()
    with torch.inference_mode():
        ours, theirs = (m(input_ids=tokens(2)).logits for m in (smaller, again))
    torch.testing.assert_close(ours, theirs)
    # what was compensated can be pruned on
    second = Layout.of(again)
    third = remove_units(again, second, torch.arange(len(second)) % 5 != 0)
    some = next(iter(second.decoder.mlp.values())).output
    torch.testing.assert_close(
        third.get_submodule(some).bias, smaller.get_submodule(some).bias, rtol=0, atol=0
    )


def test_compensated_models_load_without_this_package(search_of: NewSearch, tmp_path: Path) -> None:
    model = FAMILIES["llama3"]()
    search = search_of(model, attention="head")
    keep = without_attention(1)(search.task.layout)
    smaller = remove_units(model, search.task.layout, keep)
    Flap().compensate(search, smaller, keep)
    save_pretrained(smaller, tmp_path / "model")
    with torch.inference_mode():
        logits = smaller(input_ids=tokens(2)).logits
    assert verify_saved(tmp_path / "model", tokens(2), logits, tolerance=1e-4) <= 1e-4


def test_a_stock_class_without_bias_is_left_as_it_is(
    search_of: NewSearch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FAMILIES["llama3"]()
    search = search_of(model, attention="kv-group", quiet=False)
    keep = torch.ones(len(search.task.layout), dtype=torch.bool)
    for group in search.task.layout.groups:
        keep[group.start] = group.kind != "channel"
    smaller = remove_units(model, search.task.layout, keep)
    assert smaller.config.model_type == "llama"
    before = copy.deepcopy(smaller.state_dict())
    Flap().compensate(search, smaller, keep)
    assert before.keys() == smaller.state_dict().keys()
    assert "no bias compensation" in capsys.readouterr().err


def test_layer_losses_are_those_of_models_without_the_layer(search_of: NewSearch) -> None:
    model = FAMILIES["llama3"]()
    search = search_of(model, attention="kv-group")
    layout = search.task.layout
    found = layer_losses(search)
    for layer in range(layout.decoder.num_layers):
        keep = torch.tensor([unit.layer != layer for unit in layout])
        smaller = remove_units(model, layout, keep)
        input_ids = search.task.calibration.input_ids[:10]
        expected = SequenceNLL(smaller)(input_ids).double().mean()
        assert float(found[layer]) == pytest.approx(float(expected), rel=1e-4)
