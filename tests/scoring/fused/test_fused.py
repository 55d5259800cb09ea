"""The fused engine is the hooks engine, only faster: same losses by every route, less work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, VOCABULARY
from mixtures import MIXTURES
from scored_families import gemma3
from scoring_cases import (
    FUSED,
    assert_errs_as_hooks,
    assert_hooks_and_pruned_agree,
    related_masks,
)
from surgery_cases import MASKS, tokens
from torch import nn
from transformers import (
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
)

from bonsai_fast.methods.importance.statistics import collect_statistics
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused import sublayer_step
from bonsai_fast.scoring.fused.choose_route import choose
from bonsai_fast.scoring.fused.engine import FusedEngine
from bonsai_fast.scoring.fused.schedule import FusedWorkingSet, Schedule, waves
from bonsai_fast.surgery import remove_units

ROUTES = ["dense", "slice", "auto"]
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama3() -> PreTrainedModel:
    return FAMILIES["llama3"]()


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_is_fused_where_that_is_supported(family: str) -> None:
    model = FAMILIES[family]()
    assert MaskScorer(model).engine.name == ("fused" if family in FUSED else "hooks")
    assert MaskScorer(model, engine="hooks").engine.name == "hooks"
    if family not in FUSED:
        with pytest.raises(ValueError, match="the fused engine does not support ") as caught:
            MaskScorer(model, engine="fused")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("attention", ["head", "kv-group"])
@pytest.mark.parametrize("family", FUSED)
def test_equals_hooks_and_the_pruned_model(family: str, attention: str, route: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(3)
    layout = Layout.of(model, attention=attention, sublayers=True)
    masks = related_masks(layout)
    scored = MaskScorer(model, layout=layout, engine="fused", route=route).score(masks, input_ids)
    assert_hooks_and_pruned_agree(scored, model, layout, masks, input_ids)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mask", sorted(MASKS.keys() - {"everything gone"}))
@pytest.mark.parametrize("family", ["llama3", "llama_bias", "qwen3", "gemma", "phi3"])
def test_parents_that_were_pruned_before(family: str, mask: str, route: str) -> None:
    """Layers of different widths, unevenly shared KV heads, sub-layers that are gone."""
    parent = FAMILIES[family]()
    layout = Layout.of(parent)
    model = remove_units(parent, layout, MASKS[mask](layout))
    layout = Layout.of(model)
    masks = related_masks(layout)
    scored = MaskScorer(model, layout=layout, engine="fused", route=route).score(masks, tokens())
    hooks = MaskScorer(model, layout=layout, engine="hooks").score(masks, tokens())
    torch.testing.assert_close(scored, hooks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma"])
def test_low_precision_errs_as_hooks_do(family: str, dtype: torch.dtype, route: str) -> None:
    model = FAMILIES[family]()
    assert_errs_as_hooks(model, related_masks(Layout.of(model)), tokens(), route, dtype)


@pytest.mark.parametrize("route", ROUTES)
def test_one_submodel_alone_gives_the_same_row(llama3: PreTrainedModel, route: str) -> None:
    scorer = MaskScorer(llama3, engine="fused", route=route)
    masks = related_masks(scorer.layout)
    together = scorer.score(masks, tokens())
    alone = torch.cat([scorer.score(keep[None], tokens()) for keep in masks])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_unit_spoils_only_those_that_keep_it(poison: float, route: str) -> None:
    """Sub-models that share a prefix, a slice or a chunk with a spoilt one stay clean."""
    model, input_ids = FAMILIES["llama3"](), tokens()
    layout = Layout.of(model)
    masks = related_masks(layout)
    group = next(g for g in layout.groups if g.layer == 1 and g.kind == "channel")
    spoilt = masks[:, group.start + 3]
    assert spoilt.any() and not spoilt.all()
    clean = MaskScorer(model, layout=layout, engine="hooks").score(masks, input_ids)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = poison
    scored = MaskScorer(model, layout=layout, engine="fused", route=route).score(masks, input_ids)
    assert not torch.isfinite(scored[spoilt]).any()
    torch.testing.assert_close(scored[~spoilt], clean[~spoilt], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("route", ROUTES)
def test_no_memory_is_read_before_it_is_written(llama3: PreTrainedModel, route: str) -> None:
    scorer = MaskScorer(llama3, engine="fused", route=route)
    masks = related_masks(scorer.layout)
    assert torch.isfinite(scorer.score(masks, tokens(3))).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("wave", "chunk"), [(1, 1), (4, 3), (7, 2), (48, 5), (1000, 1000)])
def test_waves_and_chunks_do_not_change_the_answer(
    llama3: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, wave: int, chunk: int, route: str
) -> None:
    """Rows are cut anywhere, also between sub-models that share a prefix."""
    input_ids = tokens(5)
    scorer = MaskScorer(llama3, engine="fused", route=route)
    masks = related_masks(scorer.layout)
    expected = MaskScorer(llama3, engine="hooks").score(masks, input_ids)
    monkeypatch.setattr(FusedWorkingSet, "schedule", lambda *_: Schedule(wave, chunk, slices=True))
    done: list[int] = []
    scored = scorer.score(masks, input_ids, progress=done.append)
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)
    assert sum(done) == expected.numel() and min(done) > 0


@pytest.mark.parametrize(("leaves", "sequences", "rows"), [(1, 9, 4), (40, 3, 48), (7, 5, 1)])
def test_waves_cover_every_pair_once(leaves: int, sequences: int, rows: int) -> None:
    seen = torch.zeros(leaves, sequences, dtype=torch.int64)
    for some, which in waves(leaves, sequences, rows):
        here = slice(some.start, some.stop), which
        seen[here] += 1
        assert seen[here].numel() <= rows
    assert (seen == 1).all()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """Score, and count the rows that each sub-layer computed, up to its output projection."""

    def count(model: PreTrainedModel, masks: torch.Tensor, route: str) -> Counter[str]:
        scorer = MaskScorer(model, engine="fused", route=route)
        counted: Counter[str] = Counter()

        def counting(operands, states, *arguments, **options):
            counted[operands.spec.block.output.removeprefix("model.layers.")] += len(states)
            return inner(operands, states, *arguments, **options)

        inner = sublayer_step.inner
        monkeypatch.setattr(sublayer_step, "inner", counting)
        scorer.score(masks, tokens(3))
        monkeypatch.undo()
        return counted

    return count


@pytest.mark.parametrize("route", ROUTES)
def test_what_submodels_share_is_computed_once(llama3: PreTrainedModel, work, route: str) -> None:
    """Five sub-models that differ in the last MLP only cost one, and so do ten that repeat them."""
    layout = Layout.of(llama3)
    masks = torch.ones(5, len(layout), dtype=torch.bool)
    masks[:, 3] = False
    last = layout.groups[-1]
    for number in range(5):
        masks[number, last.start + number] = False
    counted = work(llama3, masks.repeat(2, 1), route)
    names = ["self_attn.o_proj", "mlp.down_proj"]
    assert counted == {f"{layer}.{name}": 3 for layer in range(3) for name in names}


def test_each_submodel_pays_from_its_first_own_mask_on(llama3: PreTrainedModel, work) -> None:
    layout = Layout.of(llama3)
    masks = torch.ones(4, len(layout), dtype=torch.bool)  # the first is the parent
    for number, (layer, kind) in enumerate([(0, "head"), (1, "channel"), (2, "head")], start=1):
        group = next(g for g in layout.groups if (g.layer, g.kind) == (layer, kind))
        masks[number, group.start] = False
    counted = work(llama3, masks, "dense")
    rows = [
        counted[f"{n}.{name}"] for n in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert rows == [3 * count for count in (1, 2, 2, 2, 3, 4)]


@pytest.mark.parametrize("route", ROUTES)
def test_a_sublayer_that_keeps_nothing_is_skipped(
    llama3: PreTrainedModel, work, route: str
) -> None:
    layout = Layout.of(llama3)
    masks = torch.ones(1, len(layout), dtype=torch.bool)
    for group in layout.groups:
        masks[0, group.start : group.stop] = group.layer != 1
    assert {name[0] for name in work(llama3, masks, route)} == {"0", "2"}


def test_hooks_on_modules_are_heeded(llama3: PreTrainedModel) -> None:
    """The model's modules are read, not called; whoever watches them must see the model run."""
    scorer = MaskScorer(llama3, engine="fused")
    masks = related_masks(scorer.layout)[:3]
    expected = scorer.score(masks, tokens())
    seen: list[nn.Module] = []
    down = llama3.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, _: seen.append(module))
    try:
        watched = scorer.score(masks, tokens())
    finally:
        handle.remove()
    assert seen and scorer.engine.name == "fused"
    torch.testing.assert_close(watched, expected, rtol=0, atol=1e-5)


def test_statistics_are_those_of_the_model(llama3: PreTrainedModel) -> None:
    scorers = [MaskScorer(llama3, engine=engine) for engine in ("fused", "hooks")]
    keep = related_masks(scorers[0].layout)[0]
    fused, hooks = (collect_statistics(scorer, keep, tokens()) for scorer in scorers)
    assert fused.blocks.keys() == hooks.blocks.keys() != set()
    for name, block in fused.blocks.items():
        assert torch.equal(block.sum_of_squares, hooks.blocks[name].sum_of_squares)


@pytest.mark.parametrize("family", FUSED)
def test_divergence_equals_that_of_hooks(family: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(3)
    found = []
    for engine in ("fused", "hooks"):
        scorer = MaskScorer(model, engine=engine)
        masks = related_masks(scorer.layout)
        found.append(scorer.divergence(masks, input_ids))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_weights_that_change_later_count(llama3: PreTrainedModel) -> None:
    model = FAMILIES["llama3"]()
    scorer = MaskScorer(model, engine="fused")
    masks = related_masks(scorer.layout)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(0.5)
        model.model.layers[1].self_attn.q_proj = nn.Linear(48, 60, bias=False)
    expected = MaskScorer(model, engine="hooks").score(masks, tokens())
    torch.testing.assert_close(scorer.score(masks, tokens()), expected, rtol=0, atol=1e-4)


def scaled() -> PreTrainedModel:
    """Looks like LLaMA, but does not add what its MLPs give."""

    class Scaled(type(FAMILIES["llama"]().model.layers[0])):
        def forward(self, *args, **kwargs):
            return 0.5 * super().forward(*args, **kwargs)

    model = FAMILIES["llama"]()
    model.model.layers[0].__class__ = Scaled
    return model


def clipped() -> PreTrainedModel:
    return OlmoForCausalLM(OlmoConfig(**SMALL, clip_qkv=8.0))


def ignored_cap() -> PreTrainedModel:
    """Gemma 3 does not apply the cap that its configuration may have."""
    return gemma3(attn_logit_softcapping=50.0)


def scalar() -> PreTrainedModel:
    model = FAMILIES["llama"]()
    model.model.layers[1].register_buffer("layer_scalar", torch.ones(()))
    return model


def another_norm() -> PreTrainedModel:
    model = FAMILIES["llama"]()
    model.model.layers[0].extra_norm = nn.RMSNorm(48)
    return model


def adapted() -> PreTrainedModel:
    """A projection that is more than its weight."""

    class Adapter(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = FAMILIES["llama"]()
    model.model.layers[2].mlp.up_proj = Adapter(48, 40, bias=False)
    return model


def extra() -> PreTrainedModel:
    model = FAMILIES["llama"]()
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(6))
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (scaled, "layer 0 computes something else than expected from its modules"),
        (clipped, r"model\.layers\.0\.self_attn clips q, k and v"),
        (ignored_cap, "Gemma3Attention is not known to apply it"),
        (scalar, r"model\.layers\.1 has an unknown buffer layer_scalar"),
        (another_norm, r"model\.layers\.0 has norms in an unknown arrangement: extra_norm, input"),
        (adapted, r"mlp\.up_proj is a Adapter, not an nn\.Linear"),
        (extra, r"model\.layers\.1 has an unknown parameter self_attn\.sinks"),
        (MIXTURES["mixtral"], r"model\.layers\.0 is a mixture of experts"),
        (FAMILIES["opt"], "OPTDecoder has no rotary_emb"),
    ],
)
def test_what_is_not_understood_is_refused_and_named(build, message: str) -> None:
    model = build().eval()
    with pytest.raises(ValueError, match=message) as caught:
        MaskScorer(model, engine="fused")
    assert "\n" not in str(caught.value)
    assert MaskScorer(model).engine.name == "hooks"


def test_unknown_route_is_refused(llama3: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="route: expected one of"):
        MaskScorer(llama3, route="scenic")


def test_too_small_a_budget_is_refused(llama3: PreTrainedModel) -> None:
    scorer = MaskScorer(llama3, engine="fused", memory_budget=1000)
    with pytest.raises(ValueError, match="one sequence of 64 tokens needs about"):
        scorer.rows_per_batch(64)


def test_without_room_for_slices_the_dense_route_is_taken(
    llama3: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = MaskScorer(llama3, engine="fused", route="slice")
    masks = related_masks(scorer.layout)
    expected = scorer.score(masks, tokens())
    engine = scorer.engine
    assert isinstance(engine, FusedEngine)
    needs = replace(FusedWorkingSet.of(scorer.layout, engine.nll, 12), logits=0, hidden=0)
    tight = needs.schedule(needs.fixed + needs.layer + needs.state)
    assert tight == Schedule(wave_rows=1, chunk_rows=1, slices=False)
    assert needs.schedule(2**30).slices
    monkeypatch.setattr(FusedWorkingSet, "schedule", lambda *_: tight)
    monkeypatch.delattr(sublayer_step, "sliced")
    torch.testing.assert_close(scorer.score(masks, tokens()), expected, rtol=0, atol=1e-5)


def test_policy_slices_when_enough_is_masked_for_enough_tokens() -> None:
    assert choose("auto", 0.5, 8192) == "slice"
    assert choose("auto", 0.5, 8) == "dense"
    assert choose("auto", 0.9999, 128) == "dense"
    assert choose("dense", 0.5, 8192) == "dense"
    assert choose("slice", 0.9999, 1) == "slice"
    # in 8 bits a copy costs more
    assert choose("auto", 0.5, 128) == "slice" and choose("auto", 0.5, 128, low=True) == "dense"
    assert choose("auto", 0.5, 1024, low=True) == "slice"
