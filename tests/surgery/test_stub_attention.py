"""removed_attention="stub": what vLLM's Transformers backend asks of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import save_pruned
from families import FAMILIES
from surgery_cases import MASKS, TOLERANCE, difference, logits_of, tokens
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units, save_pretrained
from bonsai_fast.surgery.stub_attention import with_stub_attention


def pruned(family: str, mask: str) -> PreTrainedModel:
    model = FAMILIES[family]()
    layout = Layout.of(model)
    return remove_units(model, layout, MASKS[mask](layout))


@pytest.mark.parametrize(
    "family, mask",
    [
        *((family, "first attention gone") for family in FAMILIES),
        *((family, "all attention gone") for family in ("llama3", "qwen2", "bloom")),
    ],
)
def test_the_same_function(family: str, mask: str, tmp_path: Path) -> None:
    """Saved, loaded, with a cache and without; the model itself stays as it was."""
    model = pruned(family, mask)
    before, expected = model.config.to_dict(), logits_of(model, tokens())
    save_pretrained(model, tmp_path / "model", removed_attention="stub")
    assert model.config.to_dict() == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert difference(logits_of(again, tokens()), expected) < TOLERANCE
    generated = [
        one.generate(tokens(length=6), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        for one in (again, model)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3", "phi3"])
def test_what_vllm_asks_for(family: str, tmp_path: Path) -> None:
    """An attention in every layer, and KV heads that divide the query heads."""
    save_pruned(tmp_path / "absent", family, "all attention")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "absent")
    save_pretrained(model, tmp_path / "stub", removed_attention="stub")
    written = json.loads((tmp_path / "stub" / "config.json").read_text())
    assert "AutoModel" in written["auto_map"]  # the Transformers backend builds the base model
    for entry in written["per_layer_config"].values():
        assert "attention" not in entry.get("skip", ())
        assert "q_heads_per_kv" not in entry
        heads = entry["num_attention_heads"]
        assert heads % entry.get("num_key_value_heads", heads) == 0
    assert "moe" not in (written.get("layer_types") or ())
    config = AutoConfig.from_pretrained(tmp_path / "stub")
    assert all(shape.num_heads == 1 for shape in config.layer_shapes())


def test_nothing_changes_where_nothing_was_removed(tmp_path: Path) -> None:
    for model in (pruned("llama", "irregular"), FAMILIES["llama"]()):
        assert with_stub_attention(model) is model


def test_unknown_forms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'absent' or 'stub', got 'gone'"):
        save_pretrained(FAMILIES["llama"](), tmp_path / "model", removed_attention="gone")
    assert not list(tmp_path.iterdir())
