"""The finder: units of every shape of layer, the norms that go with them, and what is refused."""

from __future__ import annotations

import time

import pytest
import torch
from surgery_cases import difference, logits_of, tokens
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)
from zoo import tiny_config, tiny_model

from bonsai_fast.models import (
    AttentionBlock,
    Decoder,
    ExpertsBlock,
    UnsupportedModelError,
    find_decoder,
)
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.hooks_engine import masked

# one of every way to store heads and channels
SHAPES = (
    *("apertus", "bamba", "bloom", "cohere", "deepseek_v3", "falcon", "gemma2", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "gpt_oss", "gptj", "minicpm3", "mpt", "nemotron_h", "olmo2"),
    *("phi3", "qwen3_5_text", "stablelm", "starcoder2", "xglm"),
)


def some_units(layout: Layout) -> torch.Tensor:
    """bool [P]: most units; the first layer loses its attention, the second its MLP."""
    keep = torch.rand(len(layout), generator=torch.Generator().manual_seed(3)) < 0.7
    for group in layout.groups:
        if group.kind in ("attention", "mlp"):
            gone = 0 if group.kind == "attention" else 1
            keep[group.start : group.stop] = group.layer != gone
    return keep


@torch.no_grad()
def overwrite_removed(model: nn.Module, layout: Layout, keep: torch.Tensor) -> int:
    """Put other numbers wherever a removed unit owns a parameter; returns how many elements."""
    parameters, count = dict(model.named_parameters()), 0
    for block, kept in layout.keep_by_block(keep):
        if not bool(kept.any()):
            for name, parameter in parameters.items():
                inside = name.startswith(tuple(f"{p}." for p in (*block.modules, *block.norms)))
                if inside and name != f"{block.output}.bias":
                    parameter.normal_(1.0, 3.0)
                    count += parameter.numel()
            continue
        for cut in block.cuts:
            gone = (~block.kept_parts(kept)[cut.owner]).nonzero().flatten()
            parameter = parameters[cut.parameter]
            shape = list(parameter.shape)
            shape[cut.dim] = len(gone)
            parameter.index_copy_(cut.dim, gone, 3 * torch.randn(shape) + 1)
            count += parameter.numel() // parameter.shape[cut.dim] * len(gone)
    return count


@pytest.mark.parametrize("model_type", SHAPES)
def test_what_a_removed_unit_owns_has_no_effect(model_type):
    """Masked units may have any weights: so removing these weights is what the mask does."""
    model = tiny_model(model_type)
    layout = Layout.of(model, sublayers=True)
    keep = some_units(layout)
    for group in layout.groups:
        if isinstance(group.block, ExpertsBlock):  # these are masked in their routers
            keep[group.start : group.stop] = True
    dense = logits_of(model, tokens())
    with masked(model, layout, keep.expand(len(tokens()), -1)):
        expected = logits_of(model, tokens())
        assert difference(dense, expected) > 0.1
        assert overwrite_removed(model, layout, keep) == layout.num_removed_parameters(keep)
        assert difference(logits_of(model, tokens()), expected) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "attention", "mlp"),
    [
        ("gemma2", ["input_layernorm", "post_attention_layernorm"],
         ["pre_feedforward_layernorm", "post_feedforward_layernorm"]),
        ("glm4", ["input_layernorm", "post_self_attn_layernorm"],
         ["post_attention_layernorm", "post_mlp_layernorm"]),
        ("olmo2", ["post_attention_layernorm"], ["post_feedforward_layernorm"]),
        ("cohere", [], []),  # one norm before both
        ("falcon", [], []),
        ("nemotron", ["input_layernorm"], ["post_attention_layernorm"]),
        ("openai-gpt", [], []),  # norms of the residual stream itself
        ("dbrx", ["norm_attn_norm.norm_1"], None),
    ],
)  # fmt: skip
def test_norms_that_go_with_a_sublayer(model_type, attention, mlp):
    decoder = find_decoder(tiny_model(model_type))
    prefix = f"{decoder.path}.0."
    assert [n.removeprefix(prefix) for n in decoder.attention[0].norms] == attention
    if mlp is not None:
        assert [n.removeprefix(prefix) for n in decoder.mlp[0].norms] == mlp


@pytest.mark.parametrize(
    ("model_type", "kind", "reason"),
    [
        ("olmo2", "head", "Olmo2RMSNorm (q_norm) normalises all heads together"),
        ("diffllama", "kv-group", "RMSNorm (groupnorm) normalises all heads together"),
        ("doge", "head", "what self_attn.v_proj gives to one head also changes others"),
        ("codegen", "head", "qkv_proj stores its heads in an order that fewer cannot keep"),
        ("olmo_hybrid", "head", "OlmoHybridGatedDeltaNet is no softmax attention"),
        ("dbrx", "channel", "its experts are not stored as transformers stores experts"),
    ],
)
def test_kinds_that_are_refused(model_type, kind, reason):
    layout = Layout.of(tiny_model(model_type), sublayers=True)
    assert layout.refused[kind] == reason
    assert kind not in layout.kinds and layout.kinds


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bart", "its layers also attend to an encoder; expected a decoder-only model"),
        ("whisper", "its layers also attend to an encoder; expected a decoder-only model"),
        ("bert", "its layers are those of an encoder; expected a decoder"),
        ("mamba", "expected heads, channels or experts that can be removed: MambaMixer is no "
         "softmax attention; no MLP adds to the hidden states of its layers"),
        ("bitnet", "expected heads, channels or experts that can be removed: BitNetRMSNorm "
         "(attn_sub_norm) normalises all heads together; BitNetRMSNorm (ffn_sub_norm) normalises "
         "all channels together"),
        ("rwkv", "expected heads, channels or experts that can be removed: its layers hold several "
         "mixers of tokens; no MLP adds to the hidden states of its layers"),
        ("gemma3n_text", "expected heads, channels or experts that can be removed: no attention "
         "adds to the hidden states of its layers; no MLP adds to the hidden states of its layers"),
        ("gemma4_assistant", "its layers read keys and values of another model"),
        ("hrm_text", "it has several stacks of layers (L_module.layers, H_module.layers)"),
    ],
)  # fmt: skip
def test_models_that_are_refused(model_type, reason):
    with pytest.raises(UnsupportedModelError) as caught:
        find_decoder(tiny_model(model_type))
    assert str(caught.value).endswith(f"cannot be pruned: {reason}")
    assert "\n" not in str(caught.value)


def test_layers_that_read_later_tokens_are_refused():
    config = tiny_config("gemma3_text")
    config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModelError, match="its layers read later tokens"):
        find_decoder(Gemma3ForCausalLM(config))


def test_keys_that_later_layers_read_too_stay():
    """The last two layers of Gemma 4 read keys of the two before: those four keep their heads."""
    values = tiny_config("gemma4_text").to_dict()
    values.pop("per_layer_config", None)
    values |= {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
    }
    decoder = find_decoder(Gemma4ForCausalLM(Gemma4TextConfig(**values)))
    assert list(decoder.attention) == [0, 1]
    assert list(decoder.mlp) == [0, 1, 2, 3, 4, 5]


def test_weights_that_layers_share_stay():
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    decoder = find_decoder(model)
    assert list(decoder.attention) == [0, 1, 2] and list(decoder.mlp) == [2]


def test_the_decoder_is_what_feeds_the_lm_head():
    """Here the vision tower has more layers than the language model."""
    text = Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    decoder = find_decoder(Gemma3ForConditionalGeneration(config))
    assert decoder.path == "model.language_model.layers" and decoder.num_layers == 2


def described(decoder: Decoder) -> list[object]:
    """All of a decoder, in values that can be compared."""
    found: list[object] = [decoder.path, decoder.num_layers, dict(decoder.refused)]
    for block in decoder.blocks():
        found.append((type(block), block.layer, block.modules, block.output, block.norms))
        found.append([(cut.parameter, cut.dim, cut.owner.tolist()) for cut in block.cuts])
        if isinstance(block, AttentionBlock):
            found.append((block.head_dim, block.kv_of_head))
    return found


@pytest.mark.parametrize("model_type", ["gemma3_text", "mpt", "minicpm3", "olmo2", "qwen3_5_text"])
def test_a_model_on_the_meta_device_has_the_same_units(model_type):
    model = tiny_model(model_type)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert described(find_decoder(empty)) == described(find_decoder(model))


def test_a_70b_model_on_the_meta_device_takes_less_than_ten_seconds():
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    start = time.process_time()
    layout = Layout.of(model)
    assert time.process_time() - start < 10
    assert layout.num_by_kind == {"head": 80 * 64, "channel": 80 * 28672}


def test_what_was_found_is_found_again_until_the_model_changes():
    model = tiny_model("llama")
    found = find_decoder(model)
    assert find_decoder(model) is found and find_decoder(tiny_model("llama")) is found
    model.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.zeros(40))
    biased = find_decoder(model)
    assert "model.layers.1.mlp.up_proj.bias" in [c.parameter for c in biased.mlp[1].cuts]


def test_the_model_is_not_touched():
    model = tiny_model("gpt2").half().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        find_decoder(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
