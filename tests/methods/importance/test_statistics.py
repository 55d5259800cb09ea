"""Calibration statistics and priors against their definitions in the paper's appendix F."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from surgery_cases import masked, tokens
from transformers import PreTrainedModel
from zoo import tiny_model

from bonsai_fast.methods.importance.prior import column_importance, unit_prior
from bonsai_fast.methods.importance.statistics import collect_statistics
from bonsai_fast.models import AttentionBlock, Block
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer

BATCH = 5


def inputs_of(model: PreTrainedModel, block: Block, input_ids: torch.Tensor) -> torch.Tensor:
    """What an output projection reads, [tokens, in_features], recorded without our code."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(block.output)
    handle = module.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double())
    )
    with torch.no_grad():
        model(input_ids=input_ids)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_over_all_tokens(family: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(BATCH)
    scorer = MaskScorer(model)
    keep = torch.ones(len(scorer.layout), dtype=torch.bool)
    statistics = collect_statistics(scorer, keep, input_ids)
    torch.testing.assert_close(statistics.losses, scorer.score(keep[None], input_ids)[0])
    for block in scorer.layout.decoder.blocks():
        seen, found = inputs_of(model, block, input_ids), statistics.of(block)
        assert found.num_tokens == len(seen)
        torch.testing.assert_close(found.mean_abs, seen.abs().mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            found.root_mean_square, seen.square().mean(0).sqrt(), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("attention", ["head", "kv-group"])
@pytest.mark.parametrize("family", ["llama3", "phi3", "opt", "bloom"])
def test_priors_are_those_of_appendix_f(family: str, attention: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(BATCH)
    layout = Layout.of(model, attention=attention)
    scorer = MaskScorer(model, layout=layout)
    statistics = collect_statistics(scorer, torch.ones(len(layout), dtype=torch.bool), input_ids)
    wanda = unit_prior("wanda", model, layout, statistics)
    activation = unit_prior("activation", model, layout, statistics)
    for group in layout.groups:
        seen = inputs_of(model, group.block, input_ids)
        weight = model.get_submodule(group.block.output).weight.detach().double()  # [out, in]
        width = group.block.head_dim if isinstance(group.block, AttentionBlock) else 1
        for unit in range(len(group)):
            parts = (group.part_of_unit == unit).nonzero().flatten()
            columns = (parts[:, None] * width + torch.arange(width)).flatten()
            a, w = seen[:, columns], weight[:, columns]
            position = group.start + unit
            expected = (w.abs().mean(0) * a.square().mean(0).sqrt()).mean()
            torch.testing.assert_close(wanda[position], expected, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(activation[position], a.abs().mean(), rtol=1e-5, atol=1e-8)
    assert (unit_prior("uniform", model, layout, statistics) == 1).all()


def test_statistics_are_those_of_the_submodel() -> None:
    """A later round measures what its sub-model computes, not its parent."""
    model, input_ids = FAMILIES["llama3"](), tokens(BATCH)
    scorer = MaskScorer(model)
    layout = scorer.layout
    keep = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < 0.6
    statistics = collect_statistics(scorer, keep, input_ids)
    last = layout.decoder.mlp[2]
    with masked(model, layout, keep):
        kept = dict(layout.keep_by_block(keep))[last]
        seen = inputs_of(model, last, input_ids)[:, kept]
    found = statistics.of(last).mean_abs[kept]
    torch.testing.assert_close(found, seen.abs().mean(0), rtol=1e-5, atol=1e-7)


def test_whole_sublayers_have_a_prior_too() -> None:
    model = FAMILIES["llama"]()
    layout = Layout.of(model, sublayers=True)
    scorer = MaskScorer(model, layout=layout)
    statistics = collect_statistics(scorer, torch.ones(len(layout), dtype=torch.bool), tokens())
    prior = unit_prior("wanda", model, layout, statistics)
    heads, whole = (
        next(g for g in layout.groups if g.kind == kind) for kind in ("head", "attention")
    )
    torch.testing.assert_close(prior[whole.start], prior[heads.start : heads.stop].mean())


def test_broken_models_and_names_are_refused() -> None:
    model = FAMILIES["llama"]()
    scorer = MaskScorer(model)
    keep = torch.ones(len(scorer.layout), dtype=torch.bool)
    statistics = collect_statistics(scorer, keep, tokens())
    with pytest.raises(ValueError, match="prior: expected one of"):
        unit_prior("magic", model, scorer.layout, statistics)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    broken = collect_statistics(scorer, keep, tokens())
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        unit_prior("wanda", model, scorer.layout, broken)


def test_projections_that_store_their_weights_the_other_way_round() -> None:
    """GPT-2's: [in_features, out_features], square in the attention."""
    model = tiny_model("gpt2")
    layout = Layout.of(model)
    text = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    everything = torch.ones(len(layout), dtype=torch.bool)
    statistics = collect_statistics(MaskScorer(model, layout=layout), everything, text)
    found = column_importance("wanda", model, layout, statistics)
    for block in layout.decoder.blocks():
        stored = model.get_submodule(block.output).weight.detach()
        naive = stored.abs().double().mean(dim=1) * statistics.of(block).root_mean_square
        torch.testing.assert_close(found[block.output].double(), naive, rtol=1e-5, atol=0)
