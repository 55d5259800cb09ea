"""What is in a GGUF file, and what is refused before one is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from export_cases import (
    GGUF_FAMILIES,
    keep_mask,
    save_biased,
    save_masked,
    save_pruned,
    windowless,
)
from families import FAMILIES, VOCABULARY
from full_disk import small_files
from gguf_cases import Read, dense_file, exported
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from bonsai_fast.export import to_gguf
from bonsai_fast.export.gguf.tensors import pair_order
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import save_pretrained

ARCHITECTURES = {"qwen3": ("qwen3", "openelm"), "qwen2": ("qwen2", "deci")}

STUBBED = ("attention of layer 0", "mlp of layer 1", "layer 1")


# What is written --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, case",
    [
        *((family, "widths") for family in GGUF_FAMILIES),
        *((family, case) for family in ("llama3", "llama_bias", "qwen3") for case in STUBBED),
    ],
)
def test_every_tensor_has_the_shape_that_the_metadata_says(
    family: str, case: str, tmp_path: Path
) -> None:
    read = exported(tmp_path, family, case)
    count, width = read.fields[f"{read.architecture}.block_count"], 48
    head_dim = read.fields[f"{read.architecture}.attention.key_length"]
    assert head_dim == read.fields[f"{read.architecture}.attention.value_length"]
    assert head_dim == read.fields[f"{read.architecture}.rope.dimension_count"]
    assert count == 3 - (case == "layer 1" and family != "llama_bias")
    heads, kv_heads, channels = (
        read.layers(key, count)
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    assert heads[0] > 0 and all(channel % 32 == 0 and channel for channel in channels)
    for index in range(count):
        query, key = heads[index] * head_dim, kv_heads[index] * head_dim
        found = {
            name.removeprefix(f"blk.{index}."): tuple(tensor.shape)
            for name, tensor in read.tensors.items()
            if name.startswith(f"blk.{index}.") and name.endswith("weight") and "norm" not in name
        }
        wanted = {
            "ffn_gate.weight": (channels[index], width),
            "ffn_up.weight": (channels[index], width),
            "ffn_down.weight": (width, channels[index]),
        }
        if read.architecture == "openelm":
            wanted["attn_qkv.weight"] = (query + 2 * key, width)
        elif heads[index]:
            wanted["attn_q.weight"] = (query, width)
            wanted["attn_k.weight"] = wanted["attn_v.weight"] = (key, width)
        if heads[index]:
            wanted["attn_output.weight"] = (width, query)
        assert found == wanted


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_architectures(family: str, tmp_path: Path) -> None:
    """Uniform models keep their parent's; others get the one with widths for each layer."""
    uniform, varied = ARCHITECTURES.get(family, ("llama", "deci"))
    assert exported(tmp_path / "varied", family).architecture == varied
    read = Read(dense_file(tmp_path / "dense", family))
    assert read.architecture == uniform
    assert read.fields[f"{uniform}.feed_forward_length"] == 64


def test_whole_layers_gone_leave_a_uniform_model(tmp_path: Path) -> None:
    parent = windowless(FAMILIES["llama3"]())
    layout = Layout.of(parent, attention="kv-group")
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if group.layer == 1:
            keep[group.start : group.stop] = False
    save_masked(tmp_path / "model", parent, layout, keep)
    result = to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert result.kind == "llama" and "[1]" in result.notes[0]
    assert Read(tmp_path / "model.gguf").fields["llama.block_count"] == 2


def test_weights_are_the_models(tmp_path: Path) -> None:
    """Padding is zero; q and k change their rows' order, and nothing else does."""
    read = exported(tmp_path, "qwen2")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    prefix = "model.layers.2"
    for name, stored in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
        for kind in ("weight", "bias"):
            rows = weights[f"{prefix}.self_attn.{stored}.{kind}"]
            order = [
                head * 8 + half * 4 + index
                for head in range(len(rows) // 8)
                for index in range(4)
                for half in range(2)
            ]
            expected = rows if name == "attn_v" else rows[order]
            assert torch.equal(read.tensors[f"blk.2.{name}.{kind}"], expected)
    down, own = read.tensors["blk.2.ffn_down.weight"], weights[f"{prefix}.mlp.down_proj.weight"]
    assert down.shape[1] == 32 > own.shape[1]
    assert torch.equal(down[:, : own.shape[1]], own) and not down[:, own.shape[1] :].any()
    assert torch.equal(read.tensors["output.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize("num_heads, head_dim", [(1, 2), (3, 10), (5, 64)])
def test_pair_order_turns_halves_into_neighbours(num_heads: int, head_dim: int) -> None:
    rows = torch.arange(num_heads * head_dim).unsqueeze(1)
    found = pair_order(rows, head_dim).reshape(num_heads, head_dim)
    for head in range(num_heads):
        for index in range(head_dim // 2):
            first, second = found[head, 2 * index], found[head, 2 * index + 1]
            assert first == head * head_dim + index and second == first + head_dim // 2


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "q8_0"])
def test_precisions(precision: str, tmp_path: Path) -> None:
    read = exported(tmp_path, "qwen3", precision=precision)
    exact = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    error = (read.tensors["token_embd.weight"] - exact).abs().max()
    assert error <= {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 1e-2}[precision]
    for name, kind in read.types.items():
        if read.tensors[name].dim() == 1:
            assert kind == "F32", name
        elif precision == "q8_0":
            # rows of 48 and of 12 heads' worth are no whole blocks
            whole = read.tensors[name].shape[1] % 32 == 0
            assert kind == ("Q8_0" if whole else "F16"), name
        else:
            assert kind == precision.upper(), name


def test_wide_padding_for_k_quants(tmp_path: Path) -> None:
    read = exported(tmp_path, "llama", pad_channels_to=256)
    assert read.fields["deci.feed_forward_length"] == 256


def test_values_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    save_pruned(tmp_path / "model", "llama")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"blk\.1\.ffn_up\.weight holds 1e\+06.*use --precision bf16"
    ):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    to_gguf(tmp_path / "model", tmp_path / "model.gguf", precision="bf16")


def test_windows_limit_the_context(tmp_path: Path) -> None:
    """llama.cpp's blocks attend to everything: up to the window's width that is the same."""
    parent = FAMILIES["mistral"]()
    layout = Layout.of(parent, attention="kv-group")
    save_masked(tmp_path / "model", parent, layout, keep_mask(layout, "widths"))
    result = to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert "limited to 5" in result.notes[0]
    assert Read(tmp_path / "model.gguf").fields["deci.context_length"] == 5


# The tokenizer ----------------------------------------------------------------------------------


def test_tokenizer_fields(tmp_path: Path) -> None:
    fields = exported(tmp_path, "llama").fields
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == VOCABULARY and tokens[1] == "<s>" and tokens[-1] == f"[PAD{96}]"
    assert "t h" in fields["tokenizer.ggml.merges"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[1] == gguf.TokenType.CONTROL and kinds[-1] == gguf.TokenType.UNUSED
    assert kinds[tokens.index("the")] == gguf.TokenType.NORMAL
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False


def rewritten(directory: Path, change: Any) -> None:
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _unigram(data: dict[str, Any]) -> None:
    data["model"] = {"type": "Unigram", "vocab": []}


def _unknown_split(data: dict[str, Any]) -> None:
    data["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "x+"},
        "behavior": "Isolated",
        "invert": False,
    }


def _too_many(data: dict[str, Any]) -> None:
    data["added_tokens"].append({**data["added_tokens"][0], "id": 97, "content": "<more>"})


@pytest.mark.parametrize(
    "change, message",
    [
        (_unigram, "holds a Unigram model"),
        (_unknown_split, "no name for a pre-tokenizer"),
        (_too_many, "token ids below 97, .* the tokenizer has token 97"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(change: Any, message: str, tmp_path: Path) -> None:
    save_pruned(tmp_path / "model", "llama")
    rewritten(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_scores_of_a_tokenizer_from_sentencepiece(tmp_path: Path) -> None:
    """llama.cpp merges by score: an earlier merge has a higher one."""
    save_pruned(tmp_path / "model", "llama")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "\u2581": 4, "t": 5, "h": 6, "e": 7}
    vocabulary |= {"th": 8, "the": 9, "\u2581the": 10}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    fields = Read(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    scores, kinds = fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"]
    assert scores[8] > scores[9] > scores[10] > scores[5] and scores[8] == 0
    assert kinds[3] == gguf.TokenType.BYTE and kinds[1] == gguf.TokenType.CONTROL


# What is refused --------------------------------------------------------------------------------


def _pruned_by_heads(directory: Path, family: str) -> None:
    parent = windowless(FAMILIES[family]())
    layout = Layout.of(parent)
    keep = torch.tensor([unit.index != 0 for unit in layout])
    save_masked(directory, parent, layout, keep)


def _reconfigured(directory: Path, family: str, **changes: Any) -> None:
    save_pruned(directory, family)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _with_an_adapter(directory: Path) -> None:
    save_pruned(directory, "llama")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.adapter.weight"] = torch.ones(2, 2)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
YARN["original_max_position_embeddings"] = 32
REFUSED = {
    "irregular heads": (
        lambda d: _pruned_by_heads(d, "llama3"),
        r"layer 0: KV heads serve \[2, 3\] query heads.*--head-layout rectangular",
    ),
    "untied and normalised": (
        lambda d: _reconfigured(d, "qwen3", tie_word_embeddings=False),
        "no architecture for layers of different widths with normalised q and k",
    ),
    "no architecture": (
        lambda d: save_pruned(d, "gemma"),
        "no architecture for a gemma with layers of",
    ),
    "stock model": (
        lambda d: save_pretrained(FAMILIES["opt"](), d),
        "convert it with llama.cpp.s own convert_hf_to_gguf.py",
    ),
    "activation": (lambda d: _reconfigured(d, "llama", hidden_act="gelu"), "silu, got 'gelu'"),
    "rotary type": (lambda d: _reconfigured(d, "llama", rope_parameters=YARN), "type 'yarn'"),
    "biased and normalised": (lambda d: save_biased(d, "qwen3"), "no biases where q and k"),
    "unknown tensor": (_with_an_adapter, "holds model.layers.0.adapter.weight, which GGUF has"),
    "no tokenizer": (
        lambda d: save_pruned(d, "llama", tokenizer=False),
        "holds no tokenizer.json; give the dense model's GGUF with --gguf-parent",
    ),
    "no model": (lambda d: d.mkdir(), "expected a run or a model directory.*no saved model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_come_before_any_work(name: str, tmp_path: Path) -> None:
    prepare, message = REFUSED[name]
    prepare(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        to_gguf(tmp_path / "model", tmp_path / "new" / "model.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_existing_files_are_left_alone(tmp_path: Path) -> None:
    save_pruned(tmp_path / "model", "llama")
    (tmp_path / "model.gguf").write_text("precious")
    with pytest.raises(FileExistsError, match=r"model\.gguf exists"):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "precious"


def test_a_full_disk_leaves_no_debris(tmp_path: Path) -> None:
    save_pruned(tmp_path / "model", "llama")
    message = r"could not write .*model\.gguf: "
    with small_files(), pytest.raises(OSError, match=message) as caught:
        to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_little_space_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pruned(tmp_path / "model", "llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="MB are needed, 0 MB are free"):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
