"""A padded checkpoint is a stock one, and the same function as the pruned model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import save_biased, save_pruned
from families import FAMILIES
from surgery_cases import MASKS, TOLERANCE, difference, logits_of, tokens
from transformers import AutoModelForCausalLM

from bonsai_fast.export import to_padded
from bonsai_fast.export.padded import pad_to_stock
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units, save_pretrained


@pytest.mark.parametrize(
    "family, mask",
    [
        *((family, "irregular") for family in FAMILIES),
        *((family, "middle layer gone") for family in ("llama_bias", "qwen2", "phi", "opt_post")),
        *((family, "half") for family in ("llama3", "phi_gqa", "bloom")),
        *((family, "everything gone") for family in ("llama3", "phi_gqa", "bloom", "qwen2")),
    ],
)
def test_padding_is_the_inverse_of_removing(family: str, mask: str) -> None:
    parent = FAMILIES[family]()
    layout = Layout.of(parent)
    smaller = remove_units(parent, layout, MASKS[mask](layout))
    if smaller.config.model_type == parent.config.model_type:
        pytest.skip("a stock model already")
    padded = pad_to_stock(smaller)
    assert type(padded) is type(parent)
    assert difference(logits_of(padded, tokens()), logits_of(smaller, tokens())) < TOLERANCE
    assert padded.num_parameters() <= parent.num_parameters()


def test_it_is_no_wider_than_the_widest_layer() -> None:
    parent = FAMILIES["llama"]()
    layout = Layout.of(parent)
    keep = torch.tensor(
        [unit.index < (4 if unit.kind == "head" else 20 + unit.layer) for unit in layout]
    )
    padded = pad_to_stock(remove_units(parent, layout, keep))
    assert (padded.config.num_attention_heads, padded.config.intermediate_size) == (4, 22)
    # 5 heads do not divide a hidden size of 48: LlamaConfig wants one more
    keep |= torch.tensor([unit.kind == "head" and unit.index < 5 for unit in layout])
    assert pad_to_stock(remove_units(parent, layout, keep)).config.num_attention_heads == 6


def test_the_directory_is_a_stock_one(tmp_path: Path) -> None:
    smaller = save_pruned(tmp_path / "model", "qwen2", "attention of layer 0")
    result = to_padded(tmp_path / "model", tmp_path / "padded")
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert config["model_type"] == result.kind == "qwen2" and "per_layer_config" not in config
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (tmp_path / "padded" / "tokenizer.json").is_file()
    assert not list((tmp_path / "padded").glob("*.py"))
    assert result.size_bytes == (tmp_path / "padded" / "model.safetensors").stat().st_size
    assert "parameters instead of" in result.notes[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert difference(logits_of(again, tokens()), logits_of(smaller, tokens())) < TOLERANCE


def test_biases_that_the_stock_class_does_not_have(tmp_path: Path) -> None:
    save_biased(tmp_path / "model", "llama3")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no place for .*proj\.bias"):
        to_padded(tmp_path / "model", tmp_path / "padded")
    assert not (tmp_path / "padded").exists()


def test_stock_models_and_used_directories_are_refused(tmp_path: Path) -> None:
    save_pretrained(FAMILIES["llama"](), tmp_path / "stock")
    with pytest.raises(ValueError, match="a stock llama model already"):
        to_padded(tmp_path / "stock", tmp_path / "padded")
    save_pruned(tmp_path / "model", "llama")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="choose another directory"):
        to_padded(tmp_path / "model", tmp_path / "used")
    assert not (tmp_path / "padded").exists()
