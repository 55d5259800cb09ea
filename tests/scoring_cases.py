"""What tests of the fused engine share: models, sub-models, and what losses are held to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import families
import torch
from families import FAMILIES
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused.engine import FusedEngine
from bonsai_fast.surgery import remove_units

FUSED = [
    *("llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen3", "gemma", "phi3"),
    *("phi", "phi_gqa"),
]


def wide_heads(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family, with heads that the kernels take."""
    model = FAMILIES[family]()
    config = model.config
    config.head_dim = 16
    for name, value in changes.items():
        setattr(config, name, value)
    return families.random_model(type(model), config, seed=21)


def related_masks(layout: Layout) -> torch.Tensor:
    """Sub-models that share much: a base, the base thinned out in one group each, all twice."""
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(len(layout), generator=generator) < 0.8
    masks = [base]
    for group in layout.groups:
        thinner = base.clone()
        thinner[group.start : group.stop] &= torch.rand(len(group), generator=generator) < 0.5
        masks.append(thinner)
    everything, nothing = torch.ones_like(base), torch.zeros_like(base)
    return torch.stack([*masks, everything, nothing, *masks[::-1]])


class OpCalls(TorchDispatchMode):
    """Counts calls of the project's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bonsai_fast":
            self.counts[func.name().partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def scorer_on_ops(model: PreTrainedModel, layout: Layout, route: str) -> MaskScorer:
    """What a model on a GPU gets."""
    scorer = MaskScorer(model, layout=layout, engine="fused", route=route)
    assert isinstance(scorer.engine, FusedEngine) and not scorer.engine.kernels
    scorer.engine.kernels = scorer.engine.nll.without_logits = True
    return scorer


def assert_hooks_and_pruned_agree(
    scored: torch.Tensor,
    model: PreTrainedModel,
    layout: Layout,
    masks: torch.Tensor,
    input_ids: torch.Tensor,
) -> None:
    """Losses [S, B] are those of hooks; the first row, also of the model cut by its mask."""
    hooks = MaskScorer(model, layout=layout, engine="hooks").score(masks, input_ids)
    torch.testing.assert_close(scored, hooks, rtol=0, atol=1e-4)
    smaller = remove_units(model, layout, masks[0])
    with torch.no_grad():
        logits = smaller(input_ids=input_ids).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(scored[0], expected, rtol=0, atol=1e-4)


def assert_errs_as_hooks(
    model: PreTrainedModel,
    masks: torch.Tensor,
    input_ids: torch.Tensor,
    route: str,
    dtype: torch.dtype,
) -> None:
    """In a low precision a route is at most twice as far from the truth as hooks are."""
    exact = MaskScorer(model, engine="hooks").score(masks, input_ids)
    model = model.to(dtype)
    hooks = MaskScorer(model, engine="hooks").score(masks, input_ids)
    scored = MaskScorer(model, engine="fused", route=route).score(masks, input_ids)
    budget = 2 * float((hooks - exact).abs().max()) + 1e-3
    assert float((scored - exact).abs().max()) <= budget
