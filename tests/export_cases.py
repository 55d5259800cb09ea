"""What the tests of exporting share: tiny pruned models that an engine can run, on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from families import COMMON, FAMILIES, SIZES, VOCABULARY, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SeedOssConfig,
    SeedOssForCausalLM,
)

from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import kept_positions, remove_units, save_pretrained


def granite(*, tied: bool) -> PreTrainedModel:
    """Multipliers far from 1."""
    config = GraniteConfig(
        **COMMON, **SIZES, num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
        embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2,
        logits_scaling=1.7, rms_norm_eps=0.01,
    )  # fmt: skip
    return random_model(GraniteForCausalLM, config, 31)


def ernie4_5() -> PreTrainedModel:
    """The rotary embedding rotates neighbours."""
    config = Ernie4_5Config(**COMMON, **SIZES, num_key_value_heads=2, head_dim=10, use_bias=True)
    return random_model(Ernie4_5ForCausalLM, config, 32)


def helium() -> PreTrainedModel:
    """The same."""
    config = HeliumConfig(**COMMON, **SIZES, num_key_value_heads=3, head_dim=8)
    return random_model(HeliumForCausalLM, config, 33)


def seed_oss() -> PreTrainedModel:
    """Biases of q, k and v, but not of the output."""
    config = SeedOssConfig(**COMMON, **SIZES, num_key_value_heads=2, head_dim=8)
    return random_model(SeedOssForCausalLM, config, 34)


LLAMA_LIKE: dict[str, Callable[[], PreTrainedModel]] = {
    "granite": partial(granite, tied=False),
    "granite_tied": partial(granite, tied=True),
    "ernie4_5": ernie4_5,
    "helium": helium,
    "seed_oss": seed_oss,
}
PARENTS = {**FAMILIES, **LLAMA_LIKE}
GGUF_FAMILIES = ("llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen3", "phi3", *LLAMA_LIKE)
# rarely typed, so that all others fit the tiny vocabulary
LEFT_OUT = set("~^|\\`@$%&{}#;")
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]

# case -> (layers without attention, layers without MLP), of three
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "widths": ((), ()),
    "attention of layer 0": ((0,), ()),
    "attention of layer 1": ((1,), ()),
    "attention of layer 2": ((2,), ()),
    "mlp of layer 1": ((), (1,)),
    "mlp of layer 2": ((), (2,)),
    "layer 0": ((0,), (0,)),
    "layer 1": ((1,), (1,)),
    "layer 2": ((2,), (2,)),
    "all attention": ((0, 1, 2), ()),
    "all mlps": ((), (0, 1, 2)),
    "everything": ((0, 1, 2), (0, 1, 2)),
}


def windowless(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights without a sliding window, which llama.cpp's blocks do not have."""
    values = model.config.to_dict()
    for name in ("layer_types", "max_window_layers", "model_type", "transformers_version"):
        values.pop(name, None)
    values |= {"sliding_window": None, "use_sliding_window": False}
    twin = type(model)(type(model.config)(**values)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def keep_mask(layout: Layout, case: str, seed: int = 0) -> torch.Tensor:
    """Widths that differ from layer to layer, also when padded; then whole sub-layers go.

    The first KV head of every layer stays. Layer 0 keeps most of its channels, the others half.
    """
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor([0.95 if unit.layer == 0 else 0.55 for unit in layout])
    keep = torch.rand(len(layout), generator=generator) < share
    without_attention, without_mlp = CASES[case]
    for group in layout.groups:
        attention = isinstance(group.block, AttentionBlock)
        keep[group.start] = True
        if group.layer in (without_attention if attention else without_mlp):
            keep[group.start : group.stop] = False
    return keep


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE for ASCII, as large as the vocabulary of the tiny models less two."""
    alphabet = [chr(code) for code in range(33, 127) if chr(code) not in LEFT_OUT]
    alphabet += ["\u0120", "\u010a"]  # a space and a line feed, as byte-level BPE writes them
    tokens = ["<pad>", "<s>", "</s>", *alphabet, *("".join(merge) for merge in MERGES)]
    assert len(tokens) < VOCABULARY
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_pruned(
    directory: Path, family: str, case: str = "widths", *, tokenizer: bool = True
) -> PreTrainedModel:
    """Prune a tiny model by whole KV groups, save it, and return it."""
    parent = windowless(PARENTS[family]())
    layout = Layout.of(parent, attention="kv-group")
    keep = keep_mask(layout, case)
    return save_masked(directory, parent, layout, keep, tokenizer=tokenizer)


def save_masked(
    directory: Path,
    parent: PreTrainedModel,
    layout: Layout,
    keep: torch.Tensor,
    *,
    tokenizer: bool = True,
) -> PreTrainedModel:
    """Remove units, save the result with its report, and return it."""
    smaller = remove_units(parent, layout, keep)
    kept = {str(index): entry for index, entry in enumerate(kept_positions(layout, keep))}
    save_pretrained(
        smaller,
        directory,
        tokenizer=character_tokenizer() if tokenizer else None,
        report={"kept": kept},
    )
    return smaller


def save_dense(directory: Path, family: str) -> PreTrainedModel:
    """The parent of `save_pruned`'s models."""
    parent = windowless(PARENTS[family]())
    layout = Layout.of(parent, attention="kv-group")
    return save_masked(directory, parent, layout, torch.ones(len(layout), dtype=torch.bool))


def save_biased(directory: Path, family: str, case: str = "widths") -> PreTrainedModel:
    """The same with random biases in its output projections, also of removed sub-layers."""
    parent = windowless(PARENTS[family]())
    layout = Layout.of(parent, attention="kv-group")
    smaller = remove_units(parent, layout, keep_mask(layout, case))
    smaller.add_output_biases()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            if name.endswith(("o_proj.bias", "down_proj.bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_pretrained(smaller, directory, tokenizer=character_tokenizer())
    return smaller
