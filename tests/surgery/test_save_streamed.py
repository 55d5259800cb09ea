"""A streamed model is saved as the loaded one is, byte for byte, with exchanged weights in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from surgery_cases import MASKS
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import bonsai_fast as bf
from bonsai_fast.checkpoints.streaming import exchanged_weights
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units, save_pretrained


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def zeroed(model: PreTrainedModel, layer: int) -> dict[int, dict[str, torch.Tensor]]:
    """The matrices of a layer, all zero."""
    path = Layout.of(model).decoder.path
    return {
        layer: {
            name: torch.zeros(parameter.shape, dtype=parameter.dtype)
            for name, parameter in model.named_parameters()
            if name.startswith(f"{path}.{layer}.") and parameter.dim() == 2
        }
    }


def assert_saved_alike(parent: Path, streamed: PreTrainedModel, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(parent, dtype="auto").eval()
    found = {}
    for name, model in (("loaded", loaded), ("streamed", streamed)):
        with exchanged_weights(model, zeroed(model, 1).get):
            save_pretrained(model, folder / name, tokenizer=byte_tokenizer(), report={"a": 1})
        found[name] = contents(folder / name)
    assert found["streamed"] == found["loaded"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= found["loaded"].keys()
    again = AutoModelForCausalLM.from_pretrained(folder / "streamed")
    zeros = zeroed(again, 1)[1]
    assert zeros and all(not again.get_parameter(name).any() for name in zeros)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path / "parent")
    assert_saved_alike(tmp_path / "parent", bf.open_streamed(tmp_path / "parent"), tmp_path)


def test_low_precision_and_shards(tmp_path: Path) -> None:
    model = FAMILIES["gemma"]().bfloat16()
    model.save_pretrained(tmp_path / "parent", max_shard_size="20KB")
    assert len(list((tmp_path / "parent").glob("*.safetensors"))) > 2
    assert_saved_alike(tmp_path / "parent", bf.open_streamed(tmp_path / "parent"), tmp_path)


def test_a_model_that_was_pruned_before(tmp_path: Path) -> None:
    """Its Python files travel with it."""
    model = FAMILIES["llama3"]()
    layout = Layout.of(model)
    save_pretrained(remove_units(model, layout, MASKS["half"](layout)), tmp_path / "parent")
    assert_saved_alike(tmp_path / "parent", bf.open_streamed(tmp_path / "parent"), tmp_path)
    assert list((tmp_path / "streamed").glob("*.py"))


def test_layers_in_host_memory(tmp_path: Path) -> None:
    FAMILIES["llama3"]().save_pretrained(tmp_path / "parent")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype="auto")
    assert_saved_alike(tmp_path / "parent", bf.stream_layers(loaded, device="cpu"), tmp_path)


def test_stubs_need_the_model_in_memory(tmp_path: Path) -> None:
    streamed = bf.stream_layers(FAMILIES["llama3"](), device="cpu")
    with pytest.raises(ValueError, match="removed_attention 'stub': expected a model in memory"):
        save_pretrained(streamed, tmp_path / "model", removed_attention="stub")
    assert not list(tmp_path.iterdir())
