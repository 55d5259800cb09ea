"""MaskScorer: row s is the parent with sub-model s's units zeroed, whatever shares its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY
from surgery_cases import masked, tokens
from torch.nn import functional as F
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.memory import parse_bytes
from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer, SequenceNLL
from bonsai_fast.scoring.working_set import WorkingSet
from bonsai_fast.surgery import remove_units

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.05}


def random_masks(layout: Layout, count: int = 5, share: float = 0.7, seed: int = 0) -> torch.Tensor:
    """Random sub-models; the first keeps everything, the last nothing."""
    masks = torch.rand(count, len(layout), generator=torch.Generator().manual_seed(seed)) < share
    masks[0], masks[-1] = True, False
    return masks


@torch.no_grad()
def slow_losses(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of each sequence from the model's own logits, float32 [B]."""
    logits = model(input_ids=input_ids).logits.float()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    return losses.mean(dim=1)


@pytest.fixture(scope="module")
def llama3() -> PreTrainedModel:
    return FAMILIES["llama3"]()


@pytest.mark.parametrize("attention", ["head", "kv-group"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_slow_masked_forward_and_pruned_model(family: str, attention: str) -> None:
    model, input_ids = FAMILIES[family](), tokens()
    layout = Layout.of(model, attention=attention, sublayers=True)
    masks = random_masks(layout)
    scored = MaskScorer(model, layout=layout).score(masks, input_ids)
    assert scored.shape == (5, 2) and scored.dtype == torch.float32
    for keep, losses in zip(masks, scored, strict=True):
        with masked(model, layout, keep):
            torch.testing.assert_close(losses, slow_losses(model, input_ids), rtol=0, atol=1e-4)
        smaller = remove_units(model, layout, keep)
        torch.testing.assert_close(losses, slow_losses(smaller, input_ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_submodel_alone_gives_the_same_row(family: str) -> None:
    model, input_ids = FAMILIES[family](), tokens()
    scorer = MaskScorer(model)
    masks = random_masks(scorer.layout)
    together = scorer.score(masks, input_ids)
    alone = torch.cat([scorer.score(keep[None], input_ids) for keep in masks])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_each_submodel_uses_its_own_mask(llama3: PreTrainedModel) -> None:
    """A wrong row index must show: every sub-model lacks another layer's MLP."""
    layout = Layout.of(llama3)
    masks = torch.ones(3, len(layout), dtype=torch.bool)
    for group in layout.groups:
        if group.kind == "channel":
            masks[group.layer, group.start : group.stop] = False
    scored = MaskScorer(llama3, layout=layout).score(masks, tokens())
    for keep, losses in zip(masks, scored, strict=True):
        with masked(llama3, layout, keep):
            torch.testing.assert_close(losses, slow_losses(llama3, tokens()), rtol=0, atol=1e-5)
    assert len({round(float(value), 4) for value in scored[:, 0]}) == 3


def test_all_kept_is_the_parent(llama3: PreTrainedModel) -> None:
    scorer = MaskScorer(llama3)
    scored = scorer.score(torch.ones(1, len(scorer.layout), dtype=torch.bool), tokens())
    torch.testing.assert_close(scored[0], slow_losses(llama3, tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama3", "phi3", "bloom", "opt"])
def test_low_precision_is_near(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]()
    masks = random_masks(Layout.of(model))
    exact = MaskScorer(model).score(masks, tokens())
    rounded = MaskScorer(model.to(dtype)).score(masks, tokens())
    torch.testing.assert_close(rounded, exact, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_removed_nan_does_not_count_and_a_kept_one_stays_in_its_row(poison: float) -> None:
    """Multiplying by zero would let NaN through; sharing a batch must not spread it."""
    model = FAMILIES["llama"]()
    layout = Layout.of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = poison
    channel = next(g.start for g in layout.groups if g.layer == 1 and g.kind == "channel") + 3
    masks = torch.ones(3, len(layout), dtype=torch.bool)
    masks[1, channel] = False
    scored = MaskScorer(model, layout=layout).score(masks, tokens())
    assert not torch.isfinite(scored[[0, 2]]).any()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0.0
    clean = MaskScorer(model, layout=layout).score(masks[1:2], tokens())
    torch.testing.assert_close(scored[1:2], clean, rtol=0, atol=1e-5)


def test_batching_does_not_change_the_answer(llama3: PreTrainedModel) -> None:
    """Pairs are cut anywhere, also inside a sub-model's sequences."""
    layout = Layout.of(llama3)
    masks, input_ids = random_masks(layout, count=7), tokens(batch=5, length=24)
    whole = MaskScorer(llama3, layout=layout).score(masks, input_ids)
    needs = WorkingSet.of(layout, SequenceNLL(llama3), 24)
    for rows in (1, 3, 4):
        budget = needs.mask + rows * needs.layer
        scorer = MaskScorer(llama3, layout=layout, engine="hooks", memory_budget=budget)
        assert scorer.rows_per_batch(24) == rows
        done: list[int] = []
        cut = scorer.score(masks, input_ids, progress=done.append)
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)
        assert sum(done) == 35 and max(done) == rows


def test_logits_are_never_held_whole(llama3: PreTrainedModel) -> None:
    """The LM head sees at most `logit_rows` tokens at a time."""
    nll = SequenceNLL(llama3)
    seen: list[int] = []
    handle = nll.head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    try:
        nll(tokens(batch=400))
    finally:
        handle.remove()
    assert sum(seen) == 400 * 11 and max(seen) <= nll.logit_rows < 400 * 11


def test_model_is_left_as_it_was() -> None:
    model = FAMILIES["phi"]().train()
    scorer = MaskScorer(model)
    scorer.score(random_masks(scorer.layout), tokens())
    assert model.training
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_dropout_is_off_while_scoring() -> None:
    model = FAMILIES["opt"]().train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    scorer = MaskScorer(model)
    masks = random_masks(scorer.layout)
    assert torch.equal(scorer.score(masks, tokens()), scorer.score(masks, tokens()))


def test_as_function_is_numpy_in_numpy_out(llama3: PreTrainedModel) -> None:
    scorer = MaskScorer(llama3)
    masks = random_masks(scorer.layout)
    function = scorer.as_function(tokens())
    expected = scorer.score(masks, tokens()).double().mean(dim=1).numpy()
    np.testing.assert_allclose(function(masks.numpy()), expected, atol=1e-6)
    np.testing.assert_allclose(function(masks.numpy().astype(float)), expected, atol=1e-6)
    assert function(masks[1].numpy()).shape == (1,)
    with pytest.raises(ValueError, match="only 0 and 1"):
        function(np.full((1, len(scorer.layout)), 0.5))


def test_softcap_and_scale_of_logits_are_applied() -> None:
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    gemma2 = Gemma2ForCausalLM(
        Gemma2Config(**common, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")
    )
    cohere = CohereForCausalLM(CohereConfig(**common, logit_scale=0.5))
    for model in (gemma2.eval(), cohere.eval()):
        scorer = MaskScorer(model)
        keep = torch.ones(1, len(scorer.layout), dtype=torch.bool)
        torch.testing.assert_close(
            scorer.score(keep, tokens())[0], slow_losses(model, tokens()), rtol=0, atol=1e-4
        )


def test_unknown_treatment_of_logits_is_refused() -> None:
    model = FAMILIES["llama"]()
    original = model.forward

    def scaled(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 3 + 1
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="its logits are not its LM head applied"):
        MaskScorer(model)


def test_bad_input_is_refused_in_one_line(llama3: PreTrainedModel) -> None:
    scorer = MaskScorer(llama3)
    P = len(scorer.layout)
    keep, input_ids = torch.ones(2, P, dtype=torch.bool), tokens()
    outside = rf"expected token ids in \[0, {VOCABULARY}\), got {VOCABULARY}"
    cases: list[tuple[type[Exception], str, torch.Tensor, torch.Tensor]] = [
        (TypeError, "expected dtype bool", keep.float(), input_ids),
        (ValueError, rf"expected shape \[S, P\] with P = {P}", keep[:, 1:], input_ids),
        (ValueError, r"expected shape \[S, P\]", keep[0], input_ids),
        (TypeError, "expected dtype int64", keep, input_ids.int()),
        (ValueError, r"expected shape \[B, T\]", keep, input_ids[0]),
        (ValueError, "T >= 2", keep, input_ids[:, :1]),
        (ValueError, outside, keep, input_ids * 0 + VOCABULARY),
        (ValueError, "got -1", keep, input_ids * 0 - 1),
    ]
    for error, message, masks, ids in cases:
        with pytest.raises(error, match=message) as caught:
            scorer.score(masks, ids)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="engine: expected one of"):
        MaskScorer(llama3, engine="warp")
    with pytest.raises(ValueError, match="one sequence of 64 tokens needs about"):
        MaskScorer(llama3, memory_budget=1000).rows_per_batch(64)


@pytest.mark.parametrize(
    ("text", "expected"), [("800MB", 800 * 10**6), ("2GiB", 2**31), ("1.5K", 1500), (77, 77)]
)
def test_parse_bytes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0", "1TB"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="expected an amount"):
        parse_bytes(text)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_agrees_with_cpu(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]()
    masks = random_masks(Layout.of(model))
    exact = MaskScorer(model).score(masks, tokens())
    scored = MaskScorer(model.to("cuda", dtype)).score(masks, tokens())
    torch.testing.assert_close(scored, exact, rtol=0, atol=max(1e-3, TOLERANCE[dtype]))


def test_heads_are_zeroed_at_the_input_of_the_output_projection(llama3: PreTrainedModel) -> None:
    """The vocabulary's one semantics: what reaches o_proj from a removed head is exactly zero."""
    layout = Layout.of(llama3)
    block = layout.decoder.attention[1]
    assert isinstance(block, AttentionBlock)
    keep = torch.ones(1, len(layout), dtype=torch.bool)
    group = next(g for g in layout.groups if g.block is block and g.kind == "head")
    keep[0, group.start + 2] = False
    seen: list[torch.Tensor] = []
    handle = llama3.get_submodule(block.output).register_forward_hook(
        lambda _, args, __: seen.append(args[0].clone())
    )
    try:
        MaskScorer(llama3, layout=layout).score(keep, tokens())
    finally:
        handle.remove()
    heads = seen[-1].view(*seen[-1].shape[:-1], block.num_heads, block.head_dim)
    assert (heads[..., 2, :] == 0).all() and (heads[..., [0, 1, 3, 4, 5], :] != 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_equals_kl_of_all_logits(family: str) -> None:
    model, input_ids = FAMILIES[family](), tokens(3)
    scorer = MaskScorer(model)
    masks = random_masks(scorer.layout)
    found = scorer.divergence(masks, input_ids)
    with torch.no_grad():
        log_p = model(input_ids=input_ids).logits[:, :-1].double().log_softmax(-1)
        for keep, divergence in zip(masks, found, strict=True):
            with masked(model, scorer.layout, keep):
                log_q = model(input_ids=input_ids).logits[:, :-1].double().log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
            torch.testing.assert_close(divergence.double(), expected, rtol=1e-4, atol=1e-4)
    assert found[0].abs().max() < 1e-4 < found[1:].min()


def test_a_route_is_refused_where_there_are_none(llama3: PreTrainedModel) -> None:
    for model, engine in ((FAMILIES["opt"](), "auto"), (llama3, "hooks")):
        with pytest.raises(ValueError, match="routes exist only in the fused engine") as caught:
            MaskScorer(model, engine=engine, route="slice")
        assert "\n" not in str(caught.value)
