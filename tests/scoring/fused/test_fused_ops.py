"""The fused engine on the project's own ops: the path of a GPU, by the ops' plain versions here."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from scoring_cases import (
    FUSED,
    OpCalls,
    related_masks,
    scorer_on_ops,
)
from surgery_cases import tokens
from transformers.activations import ACT2FN

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused.activations import kernel_name

ROUTES = ["dense", "slice"]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", FUSED)
def test_equals_hooks(family: str, route: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(3)
    layout = Layout.of(model, sublayers=True)
    masks = related_masks(layout)
    with OpCalls() as calls:
        scored = scorer_on_ops(model, layout, route).score(masks, input_ids)
    hooks = MaskScorer(model, layout=layout, engine="hooks").score(masks, input_ids)
    torch.testing.assert_close(scored, hooks, rtol=0, atol=1e-4)
    assert calls.counts["glu_mask"] and calls.counts["lm_head_nll"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_unit_spoils_only_those_that_keep_it(poison: float, route: str) -> None:
    model, input_ids = FAMILIES["llama3"](), tokens()
    layout = Layout.of(model)
    masks = related_masks(layout)
    group = next(g for g in layout.groups if g.layer == 1 and g.kind == "channel")
    spoilt = masks[:, group.start + 3]
    clean = MaskScorer(model, layout=layout, engine="hooks").score(masks, input_ids)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = poison
    scored = scorer_on_ops(model, layout, route).score(masks, input_ids)
    assert spoilt.any() and not torch.isfinite(scored[spoilt]).any()
    torch.testing.assert_close(scored[~spoilt], clean[~spoilt], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_as_hooks_do(dtype: torch.dtype) -> None:
    model = FAMILIES["llama3"]()
    layout = Layout.of(model)
    masks = related_masks(layout)
    exact = MaskScorer(model, layout=layout, engine="hooks").score(masks, tokens())
    model = model.to(dtype)
    hooks = MaskScorer(model, layout=layout, engine="hooks").score(masks, tokens())
    budget = 2 * float((hooks - exact).abs().max()) + 1e-3
    for route in ROUTES:
        scored = scorer_on_ops(model, layout, route).score(masks, tokens())
        assert float((scored - exact).abs().max()) <= budget


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("silu", "silu"), ("gelu", "gelu"), ("relu", "relu"), ("gelu_new", "gelu_tanh")),
        *(("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", None), ("quick_gelu", None)),
    ],
)
def test_activations_are_known_by_what_they_give(name: str, expected: str | None) -> None:
    assert kernel_name(ACT2FN[name]) == expected


def test_an_activation_that_no_kernel_has_is_computed_as_it_is() -> None:
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN["quick_gelu"]
    layout = Layout.of(model)
    masks = related_masks(layout)
    with OpCalls() as calls:
        scored = scorer_on_ops(model, layout, "dense").score(masks, tokens())
    hooks = MaskScorer(model, layout=layout, engine="hooks").score(masks, tokens())
    torch.testing.assert_close(scored, hooks, rtol=0, atol=1e-4)
    assert not calls.counts["glu_mask"]
