"""A language model inside a wrapper is pruned and saved in its wrapper."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from surgery_cases import MASKS, TOLERANCE, difference, logits_of, masked_logits, tokens
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units, save_pretrained, verify_saved

TEXT = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def gemma3() -> PreTrainedModel:
    """Its class builds the language model itself; two windows and one full layer."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        text_config=TEXT | {"layer_types": types},
        vision_config=VISION,
        image_token_index=96,
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    """Its class builds whatever language model the configuration names."""
    config = LlavaConfig(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=96,
    )
    return LlavaForConditionalGeneration(config)


@pytest.fixture(params=[gemma3, llava], ids=lambda build: build.__name__)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    build: Callable[[], PreTrainedModel] = request.param
    found = build().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.mark.parametrize("mask", ["irregular", "first attention gone", "all attention gone"])
def test_it_is_saved_inside_its_wrapper(model: PreTrainedModel, mask: str, tmp_path: Path) -> None:
    layout = Layout.of(model)
    assert layout.decoder.path == "model.language_model.layers"
    keep = MASKS[mask](layout)
    child = remove_units(model, layout, keep)
    assert type(child).__name__ == f"Bonsai{type(model).__name__}"
    logits = logits_of(child, tokens())
    assert difference(logits, masked_logits(model, layout, keep, tokens())) < TOLERANCE
    seen = dict(model.named_parameters())
    for name, parameter in child.named_parameters():
        if "language_model.layers" not in name:
            assert torch.equal(parameter, seen[name]), name

    save_pretrained(child, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == f"bonsai_{model.config.model_type}"
    assert "per_layer_config" in config["text_config"] and "per_layer_config" not in config
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(child)
    assert torch.equal(logits_of(loaded, tokens()), logits)
    cached = loaded(tokens()[:, :-3], use_cache=True).past_key_values
    rest = logits_of(loaded, tokens()[:, -3:], past_key_values=cached)
    assert difference(rest, logits[:, -3:]) < TOLERANCE
    loaded.save_pretrained(tmp_path / "again")
    twin = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(twin, tokens()), logits)
    again = Layout.of(twin)
    assert again.num_model_parameters == child.num_parameters()
    if mask == "irregular" and model.config.model_type == "llava":
        verify_saved(tmp_path / "model", tokens(), logits, tolerance=TOLERANCE)


def test_a_uniform_result_stays_a_stock_model(model: PreTrainedModel) -> None:
    layout = Layout.of(model)
    keep = torch.tensor([unit.kind != "channel" or unit.index < 24 for unit in layout])
    child = remove_units(model, layout, keep)
    assert type(child) is type(model)
    assert child.config.text_config.intermediate_size == 24
    expected = masked_logits(model, layout, keep, tokens())
    assert difference(logits_of(child, tokens()), expected) < TOLERANCE
