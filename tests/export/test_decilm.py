"""The DeciLM layout: what its block_configs say, and that a reader of them finds the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import CASES, save_biased, save_masked, save_pruned, windowless
from families import FAMILIES
from safetensors.torch import load_file
from surgery_cases import TOLERANCE, difference, logits_of, tokens
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bonsai_fast.export import to_decilm
from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout


def save_with_all_heads(directory: Path, case: str, family: str = "llama3") -> PreTrainedModel:
    """Channels and whole sub-layers go, query heads stay."""
    parent = windowless(FAMILIES[family]())
    layout = Layout.of(parent, attention="kv-group")
    keep = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < 0.6
    for group in layout.groups:
        attention = isinstance(group.block, AttentionBlock)
        keep[group.start] = True
        if attention:
            keep[group.start : group.stop] = True
        if group.layer in CASES[case][0 if attention else 1]:
            keep[group.start : group.stop] = False
    return save_masked(directory, parent, layout, keep)


def dense_twin(directory: Path) -> LlamaForCausalLM:
    """What a reader of DeciLM builds, as a dense LLaMA: sub-layers that are not there are zero."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    weights = load_file(directory / "model.safetensors")
    heads, width = config.num_attention_heads, config.hidden_size
    widest = 1
    for block in config.block_configs:
        assert block.attention.no_op != hasattr(block.attention, "n_heads_in_group")
        if not block.ffn.no_op:
            widest = max(widest, ffn_width(block.ffn, width))
    values = config.to_dict()
    for name in ("block_configs", "auto_map", "model_type", "architectures"):
        values.pop(name)
    values |= {"num_key_value_heads": heads, "intermediate_size": widest}
    twin = LlamaForCausalLM(LlamaConfig(**values)).eval()
    state = twin.state_dict()
    for name in state:
        if "layers" in name:
            state[name] = torch.zeros_like(state[name])
    used = set()
    for name, tensor in weights.items():
        used.add(name)
        if ".k_proj" in name or ".v_proj" in name:
            block = config.block_configs[int(name.split(".")[2])]
            kv_heads = heads // block.attention.n_heads_in_group
            tensor = tensor.unflatten(0, (kv_heads, -1))
            tensor = tensor.repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
        if ".mlp." in name:
            block = config.block_configs[int(name.split(".")[2])]
            own = tensor.shape[1 if "down" in name else 0]
            assert own == ffn_width(block.ffn, width)
        state[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    for index, block in enumerate(config.block_configs):
        prefix = f"model.layers.{index}"
        assert (f"{prefix}.self_attn.q_proj.weight" in used) != block.attention.no_op
        assert (f"{prefix}.mlp.up_proj.weight" in used) != block.ffn.no_op
    twin.load_state_dict(state)
    twin.tie_weights()
    return twin


def ffn_width(ffn: dict, hidden_size: int) -> int:
    """As every reader computes it."""
    if "ffn_mult" not in ffn:
        return ffn["intermediate_size"]
    return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // 256) * 256


@pytest.mark.parametrize("case", CASES)
def test_a_reader_finds_the_model(case: str, tmp_path: Path) -> None:
    smaller = save_with_all_heads(tmp_path / "model", case)
    result = to_decilm(tmp_path / "model", tmp_path / "decilm")
    assert (result.kind == "nemotron-nas" and "no multiples of 256" in "".join(result.notes)) or (
        case in ("all mlps", "everything")
    )
    # readers start their residual at an attention
    config = json.loads((tmp_path / "decilm" / "config.json").read_text())
    parts = [part for block in config["block_configs"] for part in block.items()]
    there = [kind for kind, part in parts if not part["no_op"]]
    assert there[0] == "attention"
    twin = dense_twin(tmp_path / "decilm")
    assert difference(logits_of(twin, tokens()), logits_of(smaller, tokens())) < TOLERANCE


@pytest.mark.parametrize("hidden_size", [48, 576, 3072, 4096])
@pytest.mark.parametrize("channels", [256, 1280, 14080])
def test_ffn_mult_says_widths_exactly(hidden_size: int, channels: int) -> None:
    from bonsai_fast.export.decilm import _width

    found = _width(channels, hidden_size)
    assert set(found) == {"ffn_mult"} and ffn_width(found, hidden_size) == channels
    assert _width(channels + 1, hidden_size) == {"intermediate_size": channels + 1}


def test_the_directory(tmp_path: Path) -> None:
    save_with_all_heads(tmp_path / "model", "attention of layer 0")
    to_decilm(tmp_path / "model", tmp_path / "decilm")
    config = json.loads((tmp_path / "decilm" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert not {"per_layer_config", "layer_types"} & config.keys()
    # strict configurations refuse null
    assert isinstance(config["intermediate_size"], int)
    names = {path.name for path in (tmp_path / "decilm").iterdir()}
    assert {"configuration_decilm.py", "tokenizer.json", "generation_config.json"} <= names
    assert not any(name.startswith("modeling") for name in names)
    found = AutoConfig.from_pretrained(tmp_path / "decilm", trust_remote_code=True)
    again = type(found)(**found.to_dict())
    assert again.block_configs[0].attention.n_heads_in_group == config["num_attention_heads"]


REFUSED = {
    "query heads": (lambda d: save_pruned(d, "llama"), "same number of query heads"),
    "family": (lambda d: save_pruned(d, "qwen2"), "LLaMA's; expected .* got 'qwen2'"),
    "biases of its own": (lambda d: save_biased(d, "llama3"), "no biases"),
    "biases": (lambda d: save_pruned(d, "llama_bias"), "no biases"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    prepare, message = REFUSED[name]
    prepare(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        to_decilm(tmp_path / "model", tmp_path / "decilm")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    save_with_all_heads(tmp_path / "model", "widths")
    monkeypatch.setattr("shutil.copy", full)
    with pytest.raises(OSError, match=r"could not save the model to .*decilm: No space left"):
        to_decilm(tmp_path / "model", tmp_path / "decilm")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
