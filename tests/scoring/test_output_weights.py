"""Sub-models with their own output projections score as the smaller models that have them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from compensated_cases import Refit, losses_of_compensated
from families import FAMILIES
from scoring_cases import FUSED
from surgery_cases import masked, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer, OutputProjection, SequenceNLL
from bonsai_fast.scoring.working_set import WorkingSet

ENGINES = ["hooks", "fused"]


def shared_masks(layout: Layout) -> torch.Tensor:
    """Sub-models that share a prefix, equal ones, whole sub-layers, everything and nothing.

    0 and 1 part in the last layer, 2 lacks the first sub-layer, 3 is 0 again, 4 is another one.
    """
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(len(layout), generator=generator) < 0.8
    late, without, other = base.clone(), base.clone(), base.clone()
    last, first = layout.groups[-3], layout.groups[0]
    late[last.start : last.stop] &= torch.rand(len(last), generator=generator) < 0.6
    without[first.start : first.stop] = False
    other &= torch.rand(len(layout), generator=generator) < 0.9
    return torch.stack(
        [base, late, without, base, other, torch.ones_like(base), torch.zeros_like(base)]
    )


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, "head") for family in FAMILIES]
    # elsewhere every query head has its own KV head
    + [(family, "kv-group") for family in ("llama3", "llama_bias", "qwen3", "phi3", "phi_gqa")],
)
def test_equals_the_smaller_models(family: str, attention: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(3)
    layout = Layout.of(model, attention=attention, sublayers=True)
    masks, refit = shared_masks(layout), Refit(model)
    expected = losses_of_compensated(model, layout, masks, refit, input_ids)
    for engine in ["hooks", "fused"] if family in FUSED else ["hooks"]:
        scorer = MaskScorer(model, layout=layout, engine=engine)
        found = scorer.score(masks, input_ids, output_weights=refit)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (found - scorer.score(masks, input_ids)).abs()[:5].max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama3", "opt"])
def test_low_precision_is_near(family: str, dtype: torch.dtype) -> None:
    """What a function makes in float32 is converted."""
    model = FAMILIES[family]()
    masks, refit = shared_masks(Layout.of(model)), Refit(model)
    exact = MaskScorer(model).score(masks, tokens(), output_weights=refit)
    scorer = MaskScorer(model.to(dtype))
    rounded = scorer.score(masks, tokens(), output_weights=refit)
    plain = scorer.score(masks, tokens()) - MaskScorer(FAMILIES[family]()).score(masks, tokens())
    budget = 2 * float(plain.abs().max()) + 1e-3
    assert float((rounded - exact).abs().max()) <= budget


@pytest.mark.parametrize("engine", ENGINES)
def test_none_is_the_parents_own(engine: str) -> None:
    """In one layer, or in all: then the scores are those without `output_weights`."""
    model, input_ids = FAMILIES["llama_bias"](), tokens()
    scorer = MaskScorer(model, engine=engine)
    masks = shared_masks(scorer.layout)
    refit = Refit(model, skip=1)
    expected = losses_of_compensated(model, scorer.layout, masks, refit, input_ids)
    found = scorer.score(masks, input_ids, output_weights=refit)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    found = scorer.score(masks, input_ids, output_weights=lambda block, keep_parts: None)
    torch.testing.assert_close(found, scorer.score(masks, input_ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bias_where_the_parent_has_none(engine: str) -> None:
    model, input_ids = FAMILIES["llama3"](), tokens()
    scorer = MaskScorer(model, engine=engine)
    masks = shared_masks(scorer.layout)
    bias = torch.linspace(-1, 1, 48)

    def biased(block, keep_parts):
        columns = keep_parts.repeat_interleave(block.part_width)
        return OutputProjection(model.get_submodule(block.output).weight[:, columns], bias)

    found = scorer.score(masks, input_ids, output_weights=biased)
    for keep, losses in zip(masks, found, strict=True):
        other = copy.deepcopy(model)
        for block, kept in scorer.layout.keep_by_block(keep):
            if not kept.all():
                other.get_submodule(block.output).bias = nn.Parameter(bias)
        with masked(other, scorer.layout, keep):
            torch.testing.assert_close(losses, losses_of(other, input_ids), rtol=0, atol=1e-4)


@torch.no_grad()
def losses_of(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    logits = model(input_ids=input_ids).logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, input_ids[:, 1:], reduction="none").mean(dim=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama_bias", "opt"])
def test_tensors_are_one_projection_for_each_submodel(family: str, engine: str) -> None:
    """Also for sub-models with equal masks, those that keep everything, and in chunks."""
    model, input_ids = FAMILIES[family](), tokens(3)
    scorer = MaskScorer(model, engine=engine if family in FUSED else "auto")
    layout = scorer.layout
    masks = shared_masks(layout)[[0, 0, 1, 1, 5, 5, 6, 6]]
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for block in layout.decoder.blocks():
        if block.layer == 1:
            for name, parameter in model.get_submodule(block.output).named_parameters():
                noise = torch.randn(len(masks), *parameter.shape, generator=generator)
                tensors[f"{block.output}.{name}"] = parameter.detach() + 0.2 * noise
    expected = []
    for number, keep in enumerate(masks):
        other = copy.deepcopy(model)
        own = {name: tensor[number] for name, tensor in tensors.items()}
        other.load_state_dict(own, strict=False)
        with masked(other, layout, keep):
            expected.append(losses_of(other, input_ids))
    found = scorer.score(masks, input_ids, output_weights=tensors)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-4)
    assert len(set(found[:, 0].tolist())) == len(masks)
    session = scorer.session(input_ids, output_weights=tensors)
    session.__dict__["submodels_per_chunk"] = 3
    chunks = [chunk.losses() for chunk in session.chunks(masks)]
    assert [len(losses) for losses in chunks] == [3, 3, 2]
    torch.testing.assert_close(torch.cat(chunks), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_chunks_divergence_and_function_use_them(engine: str) -> None:
    model, input_ids = FAMILIES["llama3"](), tokens(3)
    scorer, refit = MaskScorer(model, engine=engine), Refit(model)
    masks = shared_masks(scorer.layout)
    expected = scorer.score(masks, input_ids, output_weights=refit)
    session = scorer.session(input_ids, output_weights=refit)
    session.__dict__["submodels_per_chunk"] = 4
    chunks = torch.cat([chunk.losses() for chunk in session.chunks(masks)])
    torch.testing.assert_close(chunks, expected, rtol=0, atol=1e-5)
    function = scorer.as_function(input_ids, output_weights=refit)
    np.testing.assert_allclose(function(masks.numpy()), expected.double().mean(1), atol=1e-5)
    divergence = scorer.divergence(masks, input_ids, output_weights=refit)
    assert divergence[5].abs().max() < 1e-4 < divergence[[0, 1, 2, 4, 6]].min()
    without = scorer.divergence(masks, input_ids)
    assert (divergence - without)[[0, 1, 2, 4]].abs().min() > 1e-3


def test_hooks_on_an_output_projection_see_all_rows() -> None:
    """Foreign hooks act on what the own projections give, as they would in the smaller model."""
    model, input_ids = FAMILIES["llama3"](), tokens(3)
    scorer, refit = MaskScorer(model), Refit(model)
    masks = shared_masks(scorer.layout)
    seen: list[int] = []

    def doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(len(output))
        return 2 * output

    def twice(block, keep_parts):
        made = refit(block, keep_parts)
        factor = 2 if block.output == "model.layers.1.mlp.down_proj" else 1
        return OutputProjection(factor * made.weight)

    expected = scorer.score(masks[:3], input_ids, output_weights=twice)
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(doubled)
    try:
        found = scorer.score(masks[:3], input_ids, output_weights=refit)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert sum(seen) == 9


def test_batches_of_hooks_have_room_for_a_projection() -> None:
    model, input_ids = FAMILIES["llama3"](), tokens(5, 24)
    layout, refit = Layout.of(model), Refit(model)
    masks = shared_masks(layout)
    whole = MaskScorer(model, layout=layout, engine="hooks").score(
        masks, input_ids, output_weights=refit
    )
    plain, needs = (
        WorkingSet.of(layout, SequenceNLL(model), 24, own_outputs=own) for own in (False, True)
    )
    # D times the columns of the widest projection, in the model's dtype and as it is made
    assert needs.output >= 2 * 4 * 48 * 60 and replace(needs, output=0) == plain
    for rows in (1, 4):
        budget = needs.mask + needs.output + rows * needs.layer
        scorer = MaskScorer(model, layout=layout, engine="hooks", memory_budget=budget)
        assert scorer.engine.rows_per_batch(24, own_outputs=True) == rows
        cut = scorer.score(masks, input_ids, output_weights=refit)
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)
    # batches of whole sub-models, if one fits: what equal neighbours have is made once for both
    budget = needs.mask + needs.output + 14 * needs.layer
    scorer, refit = (
        MaskScorer(model, layout=layout, engine="hooks", memory_budget=budget),
        Refit(model),
    )
    cut = scorer.score(masks[[0, 0, 1, 1]], input_ids, output_weights=refit)
    torch.testing.assert_close(cut, whole[[0, 0, 1, 1]], rtol=0, atol=1e-5)
    different = {
        (block.output, row.numpy().tobytes())
        for block, kept in layout.keep_by_block(masks[:2])
        for row in kept
        if not row.all()
    }
    assert set(refit.made) == different and max(refit.made.values()) == 2


def test_bad_projections_are_refused_in_one_line() -> None:
    model = FAMILIES["llama3"]()
    down = "model.layers.0.mlp.down_proj"
    stack = torch.zeros(7, 48, 40)

    def made(weight: Tensor, bias: Tensor | None = None):
        return lambda block, keep_parts: OutputProjection(weight, bias)

    def short(block, keep_parts):
        width = int(keep_parts.sum()) * block.part_width
        return OutputProjection(torch.zeros(48, width), torch.zeros(47))

    cases = [
        (made(torch.zeros(48, 1)), r"expected a weight of shape \(48, \d+\), a column for each"),
        (made(torch.zeros(48)), r"got \(48,\)"),
        (short, r"expected a bias of shape \(48,\), got \(47,\)"),
        (
            {"lm_head.weight": stack},
            "expected names such as model.layers.0.self_attn.o_proj.weight",
        ),
        ({f"{down}.bias": stack[..., 0]}, f"expected {down}.weight beside {down}.bias"),
        ({f"{down}.weight": stack[:6]}, "one row for each of 7 sub-models and 3 dimensions"),
        ({f"{down}.weight": stack[..., 1:]}, "expected 40 input features"),
    ]
    for engine in ENGINES:
        scorer = MaskScorer(model, engine=engine)
        masks = shared_masks(scorer.layout)
        for given, message in cases:
            with pytest.raises(ValueError, match=message) as caught:
                scorer.score(masks, tokens(), output_weights=given)
            assert "\n" not in str(caught.value)
