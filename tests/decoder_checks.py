"""One decoder, from its units to the saved model: scored, cut and loaded again must agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from surgery_cases import TOLERANCE, difference, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.surgery import remove_units, save_pretrained

NEW_TOKENS = 6
WHOLE = ("attention", "mlp")
TEXT = tokens(batch=2, length=12)


def uneven(layout: Layout) -> torch.Tensor:
    """Without a fifth to a half of the parts of each sub-layer, by layer; whole ones stay."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if group.kind not in WHOLE:
            order = torch.randperm(len(group), generator=generator)
            gone = int((0.2 + 0.15 * (group.layer % 3)) * len(group))
            keep[group.start + order[:gone]] = False
    return keep


def sublayers(layout: Layout) -> torch.Tensor:
    """No attention in the first layer that can lose it, no MLP in the last, and some units less."""
    keep = uneven(layout)
    groups = {kind: [g for g in layout.groups if g.kind == kind] for kind in WHOLE}
    for group in (*groups["attention"][:1], *groups["mlp"][-1:]):
        keep[group.start : group.stop] = False
    return keep


def equal_layers(layout: Layout) -> torch.Tensor:
    """The same numbers of units in all layers: the last part of every sub-layer is removed."""
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if len(group) > 1:
            keep[group.stop - max(1, len(group) // 5) : group.stop] = False
    return keep


def check_decoder(model: PreTrainedModel, folder: Path) -> None:
    """Fail unless masked losses are those of the cut models, and of these saved and loaded again.

    Args:
        model: a decoder that `Layout.of` accepts.
        folder: for saved models.
    """
    layout = Layout.of(model, sublayers=True)
    # a few classes generate something else with their cache, pruned or not
    exact_cache = greedy(model, use_cache=True) == greedy(model, use_cache=False)
    found = _check_masks(model, layout, (uneven, sublayers), folder, exact_cache)
    with torch.no_grad():
        dense = loss_of(model)
    assert (
        difference(_hooks(model, layout, torch.ones(1, len(layout)).bool())[0], dense) < TOLERANCE
    )
    for mask, loss in found.items():
        assert difference(loss, dense) > 1e-3, f"{mask}: removing units changes nothing"
    groups = Layout.of(model, attention="kv-group")
    _check_masks(model, groups, (equal_layers,), folder, exact_cache)


def _check_masks(
    model: PreTrainedModel,
    layout: Layout,
    masks: tuple[Callable[[Layout], torch.Tensor], ...],
    folder: Path,
    exact_cache: bool,
) -> dict[str, torch.Tensor]:
    """Check these masks; returns the loss of each by its name."""
    keep = torch.stack([mask(layout) for mask in masks])
    found = {}
    for mask, kept, scored in zip(masks, keep, _hooks(model, layout, keep), strict=True):
        name = mask.__name__
        cut = remove_units(model, layout, kept)
        assert cut.num_parameters() == layout.num_model_parameters - layout.num_removed_parameters(
            kept
        ), f"{name}: other numbers of parameters than counted"
        assert difference(loss_of(cut), scored) < TOLERANCE, f"{name}: cut differs from masked"
        saved = folder / name
        save_pretrained(cut, saved)
        # moved as users move it: nothing of it may be on the meta device
        loaded = AutoModelForCausalLM.from_pretrained(saved).eval().to("cpu")
        assert type(loaded) is type(cut)
        assert difference(loss_of(loaded), scored) < TOLERANCE, f"{name}: loaded differs"
        if exact_cache:
            with_cache, without = (greedy(loaded, use_cache=cache) for cache in (True, False))
            assert with_cache == without, f"{name}: the cache changes what is generated"
        found[name] = scored
    return found


def _hooks(model: PreTrainedModel, layout: Layout, keep: torch.Tensor) -> torch.Tensor:
    """Losses of masks bool [S, P]: float [S, B]."""
    return MaskScorer(model, layout=layout, engine="hooks").score(keep, TEXT)


@torch.no_grad()
def loss_of(model: PreTrainedModel) -> torch.Tensor:
    """Mean negative log-likelihood of each sequence: float [B]."""
    logits = model(input_ids=TEXT, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), TEXT[:, 1:], reduction="none").mean(1)


def greedy(model: PreTrainedModel, *, use_cache: bool) -> list[list[int]]:
    """The tokens that follow, beyond the window of models that have one."""
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    found: list[list[int]] = model.generate(TEXT, generation_config=config).tolist()
    return found
