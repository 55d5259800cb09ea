"""remove_units: the smaller model computes what the parent computes with the same units masked."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from surgery_cases import (
    MASKS,
    TOLERANCE,
    difference,
    logits_of,
    masked,
    masked_logits,
    tokens,
)
from transformers import DynamicCache, OlmoConfig, OlmoForCausalLM, PreTrainedModel

from bonsai_fast.models import AttentionBlock, family_of
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import kept_positions, remove_units

GRANULARITIES = ("head", "kv-group")
# One family of every kind of attention and of mask lookup, where all of them would take too long.
KINDS = ("llama3", "mistral", "qwen2", "phi3", "opt", "bloom", "gpt_neox")


def prune(
    family: str, mask: str = "half", attention: str = "head"
) -> tuple[PreTrainedModel, Layout, torch.Tensor, PreTrainedModel]:
    model = FAMILIES[family]()
    layout = Layout.of(model, attention=attention)
    keep = MASKS[mask](layout)
    return model, layout, keep, remove_units(model, layout, keep)


# The same function ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_masked_parent(family: str, attention: str) -> None:
    model = FAMILIES[family]()
    layout = Layout.of(model, attention=attention)
    input_ids = tokens()
    for name, mask in MASKS.items():
        keep = mask(layout)
        child = remove_units(model, layout, keep)
        expected = masked_logits(model, layout, keep, input_ids)
        assert difference(logits_of(child, input_ids), expected) < TOLERANCE, name
        parameters = sum(parameter.numel() for parameter in child.parameters())
        removed = layout.num_removed_parameters(keep)
        assert parameters == layout.num_model_parameters - removed, name


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_the_reference_matter(family: str) -> None:
    """Guards the test above: a mask without effect would agree with anything."""
    model = FAMILIES[family]()
    layout = Layout.of(model)
    keep = MASKS["most"](layout)
    input_ids = tokens()
    assert (
        difference(masked_logits(model, layout, keep, input_ids), logits_of(model, input_ids)) > 0.1
    )


@pytest.mark.parametrize("family", KINDS)
def test_any_irregular_grouping(family: str) -> None:
    """KV heads with different numbers of readers, or that go with their last one."""
    model = FAMILIES[family]()
    layout = Layout.of(model)
    input_ids = tokens()
    for seed in range(6):
        keep = torch.rand(len(layout), generator=torch.Generator().manual_seed(seed)) < 0.6
        child = remove_units(model, layout, keep)
        expected = masked_logits(model, layout, keep, input_ids)
        assert difference(logits_of(child, input_ids), expected) < TOLERANCE


def test_whole_sublayers_as_units() -> None:
    model = FAMILIES["llama_bias"]()
    layout = Layout.of(model, sublayers=True)
    keep = torch.tensor(
        [unit.kind not in ("attention", "mlp") or unit.layer != 1 for unit in layout]
    )
    child = remove_units(model, layout, keep)
    assert child.model.layers[1].removed_sublayers == ("attention", "mlp")
    expected = masked_logits(model, layout, keep, tokens())
    assert difference(logits_of(child, tokens()), expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llama_bias", "opt", "bloom", "phi"])
def test_the_output_bias_of_a_removed_sublayer_stays(family: str) -> None:
    _, layout, _, child = prune(family, "everything gone")
    names = {name for name, _ in child.named_parameters()}
    biases = {f"{block.output}.bias" for block in layout.decoder.blocks()}
    inside = {name for name in names if name.startswith(f"{layout.decoder.path}.")}
    norms = {name for name in inside if "norm" in name}
    assert inside - norms == biases
    assert len(norms) == (6 if family == "phi" else 0)  # the norm before both of phi's sub-layers


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "phi3", "phi_gqa", "opt", "gpt_neox"])
def test_attention_implementations(family: str, implementation: str) -> None:
    """Also when it is set after the surgery, and in layers with irregular groups."""
    model, layout, keep, child = prune(family, "most")
    for parent_or_child in (model, child):
        parent_or_child.set_attn_implementation(implementation)
    expected = masked_logits(model, layout, keep, tokens())
    assert difference(logits_of(child, tokens()), expected) < TOLERANCE
    again = remove_units(model, layout, keep)
    assert again.config._attn_implementation == implementation
    if implementation == "eager":
        attentions = child(tokens(), output_attentions=True).attentions
        heads = [len(layer["heads"]) for layer in kept_positions(layout, keep)]
        assert [weights.shape[1] for weights in attentions] == [count for count in heads if count]


@pytest.mark.parametrize("family", KINDS)
def test_bfloat16(family: str) -> None:
    model = FAMILIES[family]().bfloat16()
    layout = Layout.of(model)
    keep = MASKS["half"](layout)
    child = remove_units(model, layout, keep)
    assert {parameter.dtype for parameter in child.parameters()} == {torch.bfloat16}
    expected = masked_logits(model, layout, keep, tokens())
    exact = masked_logits(FAMILIES[family](), layout, keep, tokens())
    # as far from the truth as bfloat16 itself is
    assert difference(logits_of(child, tokens()), exact) < 2 * difference(expected, exact) + 0.05


# Caches, padding, generation --------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["half", "first attention gone", "all attention gone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_agrees(family: str, mask: str) -> None:
    """With a dynamic cache, without a cache, with a static cache, and by the masked parent."""
    model, layout, keep, child = prune(family, mask)
    prompt = tokens(length=7)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(prompt)}
    dynamic = child.generate(prompt, **options)
    assert torch.equal(dynamic, child.generate(prompt, **options, use_cache=False))
    assert torch.equal(dynamic, child.generate(prompt, **options, cache_implementation="static"))
    with masked(model, layout, keep):
        assert torch.equal(dynamic, model.generate(prompt, **options))


@pytest.mark.parametrize("mask", ["half", "first attention gone", "all attention gone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_equal_one_forward(family: str, mask: str) -> None:
    child = prune(family, mask)[-1]
    input_ids = tokens()
    whole = logits_of(child, input_ids)
    cache = DynamicCache(config=child.config)
    parts = [
        logits_of(child, part, past_key_values=cache, use_cache=True)
        for part in input_ids.split([5, 4, 1, 1, 1], dim=1)
    ]
    assert difference(torch.cat(parts, dim=1), whole) < TOLERANCE


@pytest.mark.parametrize("mask", ["half", "first attention gone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family: str, mask: str) -> None:
    child = prune(family, mask)[-1]
    prompt = tokens(batch=1, length=6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], dim=1)
    both = torch.cat([padded, tokens(batch=1, length=9, seed=1)])
    padding_mask = (both != 0).long()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = child.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    together = child.generate(both, attention_mask=padding_mask, **options)
    assert torch.equal(together[0, 9:], alone[0, 6:])


def test_the_cache_keeps_one_copy_of_a_shared_kv_head() -> None:
    child = prune("llama3", "most")[-1]
    irregular = [
        i
        for i, layer in enumerate(child.model.layers)
        if hasattr(layer.self_attn, "q_heads_per_kv")
    ]
    assert irregular
    cache = child(tokens()).past_key_values
    for i in irregular:
        groups = child.model.layers[i].self_attn.q_heads_per_kv
        assert cache.layers[i].keys.shape[1] == len(groups) < sum(groups)


def test_a_removed_attention_keeps_no_cache() -> None:
    child = prune("mistral", "first attention gone")[-1]
    cache = child(tokens()).past_key_values
    assert getattr(cache.layers[0], "keys", None) is None
    assert cache.layers[1].keys.numel()


# The result itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_gives_the_stock_model(family: str) -> None:
    model = FAMILIES[family]()
    layout = Layout.of(model)
    child = remove_units(model, layout, torch.ones(len(layout), dtype=torch.bool))
    assert type(child) is type(model)
    assert child.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits_of(child, tokens()), logits_of(model, tokens()))


@pytest.mark.parametrize("family", KINDS)
def test_the_parent_is_left_alone(family: str) -> None:
    model = FAMILIES[family]()
    before = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    layout = Layout.of(model)
    child = remove_units(model, layout, MASKS["half"](layout))
    with torch.no_grad():
        for tensor in [*child.parameters(), *child.buffers()]:
            tensor.add_(1.0)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config


def test_what_is_carried_over() -> None:
    model = FAMILIES["llama3"]().train()
    model.requires_grad_(False)
    model.generation_config.temperature = 0.125
    layout = Layout.of(model)
    child = remove_units(model, layout, MASKS["half"](layout))
    assert child.training
    assert not any(parameter.requires_grad for parameter in child.parameters())
    assert child.generation_config.temperature == 0.125
    assert child.generation_config is not model.generation_config
    assert child.lm_head.weight is child.model.embed_tokens.weight
    assert torch.equal(child.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    model.eval()
    assert not remove_units(model, layout, MASKS["half"](layout)).training


def test_a_rotary_embedding_that_has_grown_shrinks_again() -> None:
    """A dynamic one keeps its length beside its buffers: both must come along."""
    model = FAMILIES["llama"]()
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 8
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = type(model)(config).eval()
    layout = Layout.of(model)
    keep = MASKS["half"](layout)
    short = masked_logits(model, layout, keep, tokens(length=6))
    logits_of(model, tokens(length=20))
    child = remove_units(model, layout, keep)
    assert difference(logits_of(child, tokens(length=6)), short) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models_can_be_pruned_again(family: str) -> None:
    model, layout, keep, first = prune(family, "most")
    inner = Layout.of(first)
    assert (
        inner.num_model_parameters
        == layout.num_model_parameters - layout.num_removed_parameters(keep)
    )
    keep_again = torch.rand(len(inner), generator=torch.Generator().manual_seed(9)) < 0.6
    for group in inner.groups:
        if group.layer == 0 and isinstance(group.block, AttentionBlock):
            keep_again[group.start : group.stop] = False
    second = remove_units(first, inner, keep_again)
    expected = masked_logits(first, inner, keep_again, tokens())
    assert difference(logits_of(second, tokens()), expected) < TOLERANCE
    last = remove_units(second, Layout.of(second), MASKS["everything gone"](Layout.of(second)))
    nothing = Layout.of(last)
    assert len(nothing) == 0
    same = remove_units(last, nothing, torch.ones(0, dtype=torch.bool))
    assert torch.equal(logits_of(same, tokens()), logits_of(last, tokens()))
    assert family_of(last.config.model_type) == family_of(model.config.model_type)


@pytest.mark.parametrize("family", KINDS)
def test_copies_are_independent(family: str) -> None:
    child = prune(family, "first attention gone")[-1]
    expected = logits_of(child, tokens())
    twin = copy.deepcopy(child)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(twin, tokens()), expected)
    if family not in ("bloom",):
        twin.set_attn_implementation("eager")
        assert child.config._attn_implementation != "eager"
        assert difference(logits_of(twin, tokens()), expected) < TOLERANCE


def test_it_trains() -> None:
    """Recovery fine-tunes what surgery leaves."""
    child = prune("qwen2", "first attention gone")[-1].train()
    child.gradient_checkpointing_enable()
    child(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in child.parameters())


def test_kept_positions() -> None:
    model = FAMILIES["llama"]()
    layout = Layout.of(model)
    keep = torch.tensor([unit.layer == 1 and unit.index in (2, 5) for unit in layout])
    empty = {"heads": [], "channels": []}
    assert kept_positions(layout, keep) == [empty, {"heads": [2, 5], "channels": [2, 5]}, empty]


# Errors -----------------------------------------------------------------------------------------


def test_errors_about_the_mask() -> None:
    model = FAMILIES["llama"]()
    layout = Layout.of(model)
    with pytest.raises(TypeError, match="bool"):
        remove_units(model, layout, torch.ones(len(layout)))
    with pytest.raises(ValueError, match=r"\[P\]"):
        remove_units(model, layout, torch.ones(1, len(layout), dtype=torch.bool))
    with pytest.raises(ValueError, match=f"P = {len(layout)}"):
        remove_units(model, layout, torch.ones(len(layout) - 1, dtype=torch.bool))


def test_errors_about_the_model() -> None:
    model = FAMILIES["llama"]()
    layout = Layout.of(model)
    keep = MASKS["half"](layout)
    with pytest.raises(ValueError, match="another model"):
        remove_units(FAMILIES["llama3"](), layout, keep)
    with pytest.raises(ValueError, match="one device"):
        remove_units(copy.deepcopy(model).to("meta"), layout, keep)
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantized"):
        remove_units(model, layout, keep)


def test_what_a_stock_class_expresses_and_what_ours_does() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6}
    model = OlmoForCausalLM(OlmoConfig(vocab_size=97, num_hidden_layers=2, pad_token_id=0, **sizes))
    layout = Layout.of(model.eval())
    keep = torch.tensor([unit.kind != "channel" or unit.index < 24 for unit in layout])
    child = remove_units(model, layout, keep)
    assert type(child) is OlmoForCausalLM and child.config.intermediate_size == 24
    expected = masked_logits(model, layout, keep, tokens())
    assert difference(logits_of(child, tokens()), expected) < TOLERANCE
    keep[0] = False
    child = remove_units(model, layout, keep)
    assert type(child).__name__ == "BonsaiOlmoForCausalLM"
    expected = masked_logits(model, layout, keep, tokens())
    assert difference(logits_of(child, tokens()), expected) < TOLERANCE


def test_classes_that_transformers_does_not_have() -> None:
    class Mine(OlmoForCausalLM):
        pass

    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6}
    model = Mine(OlmoConfig(vocab_size=97, num_hidden_layers=2, pad_token_id=0, **sizes))
    layout = Layout.of(model)
    keep = torch.ones(len(layout), dtype=torch.bool)
    keep[0] = False
    with pytest.raises(ValueError, match=r"Mine.*own configuration.*transformers itself"):
        remove_units(model, layout, keep)
