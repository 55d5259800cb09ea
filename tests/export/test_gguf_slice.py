"""GGUF files cut out of the dense model's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import save_pruned
from gguf_cases import Read, dense_file, exported
from safetensors.torch import load_file, save_file

from bonsai_fast.export import DenseGGUF, KeptLayer, slice_gguf, to_gguf, to_gguf_from_parent


@pytest.mark.parametrize(
    "family, case",
    [
        *(("llama3", case) for case in ("widths", "attention of layer 0", "layer 1", "everything")),
        *((family, "widths") for family in ("llama_bias", "qwen2", "qwen3")),
        *((family, "layer 2") for family in ("llama_bias", "qwen2", "qwen3")),
    ],
)
def test_cutting_the_dense_file_gives_the_same_file(family: str, case: str, tmp_path: Path) -> None:
    """Two ways to one result; they share neither the reading of weights nor that of heads."""
    dense = dense_file(tmp_path / "dense", family)
    own = exported(tmp_path, family, case)
    to_gguf_from_parent(tmp_path / "model", dense, tmp_path / "cut.gguf", precision="f32")
    cut = Read(tmp_path / "cut.gguf")
    assert cut.tensors.keys() == own.tensors.keys()
    for name, tensor in own.tensors.items():
        assert torch.equal(cut.tensors[name], tensor), name
    differ = {"general.name", "GGUF.kv_count"}
    assert {k: v for k, v in cut.fields.items() if k not in differ} == {
        k: v for k, v in own.fields.items() if k not in differ
    }


@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_half_precision_parents(precision: str, tmp_path: Path) -> None:
    dense = dense_file(tmp_path / "dense", "llama3", precision)
    save_pruned(tmp_path / "model", "llama3")
    to_gguf_from_parent(tmp_path / "model", dense, tmp_path / "cut.gguf", precision=precision)
    to_gguf(tmp_path / "model", tmp_path / "own.gguf", precision=precision)
    own, cut = Read(tmp_path / "own.gguf"), Read(tmp_path / "cut.gguf")
    for name, tensor in own.tensors.items():
        assert torch.equal(cut.tensors[name], tensor), name


def test_no_tokenizer_is_needed_with_a_parent(tmp_path: Path) -> None:
    dense = dense_file(tmp_path / "dense", "llama3")
    save_pruned(tmp_path / "model", "llama3", tokenizer=False)
    to_gguf_from_parent(tmp_path / "model", dense, tmp_path / "cut.gguf")
    assert Read(tmp_path / "cut.gguf").fields["tokenizer.ggml.pre"] == "gpt-2"


def test_cutting_needs_no_model_directory(tmp_path: Path) -> None:
    dense = DenseGGUF(dense_file(tmp_path / "dense", "llama3"))
    kept = [KeptLayer((0, 1, 2), (1, 5)), KeptLayer((), (7,)), KeptLayer((3, 4, 5), ())]
    slice_gguf(dense, kept, tmp_path / "cut.gguf", precision="f32")
    read, whole = Read(tmp_path / "cut.gguf"), Read(dense.path)
    up = whole.tensors["blk.0.ffn_up.weight"]
    assert torch.equal(read.tensors["blk.0.ffn_up.weight"][:2], up[[1, 5]])
    assert read.fields["deci.attention.head_count"] == [3, 0, 3]
    for wrong, message in (
        ([*kept, kept[0]], "it has 3 layers, the pruned model's parent 4"),
        ([KeptLayer((6,), (0,)), *kept[1:]], "query head 6 of layer 0 is kept, but it has 6"),
        ([KeptLayer((0, 1, 3), (0,)), *kept[1:]], r"serve \[2, 1\] query heads"),
    ):
        with pytest.raises(ValueError, match=message):
            slice_gguf(dense, wrong, tmp_path / "wrong.gguf")


def _other_weights(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _no_report(directory: Path) -> None:
    (directory / "bonsai_report.json").unlink()


def _compensated(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"output_bias": True}))
    weights = load_file(directory / "model.safetensors")
    projections = [n for n in weights if n.endswith(("o_proj.weight", "down_proj.weight"))]
    for name in projections:
        weights[name.replace("weight", "bias")] = torch.ones(len(weights[name]))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _one_more_bias(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    rows = weights["model.layers.1.self_attn.q_proj.weight"]
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(len(rows))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


WRONG_PARENTS = {
    "quantized": (lambda t: dense_file(t / "p", "llama3", "q8_0"), None, "is quantized"),
    "other heads": (lambda t: dense_file(t / "p", "llama"), None, "give other widths"),
    "other weights": (lambda t: dense_file(t / "p", "qwen2"), None, "is of another model, or"),
    "changed weights": (
        lambda t: dense_file(t / "p", "llama3"),
        _other_weights,
        r"blk\.1\.ffn_down\.weight differs by 9\.1%; leave out --gguf-parent",
    ),
    "biases that are not in it": (
        lambda t: dense_file(t / "p", "llama3"),
        _compensated,
        "has biases that .* does not have; leave out --gguf-parent",
    ),
    "a tensor that is not in it": (
        lambda t: dense_file(t / "p", "llama3"),
        _one_more_bias,
        r"only one of the two has blk\.1\.attn_q\.bias",
    ),
    "no report": (lambda t: dense_file(t / "p", "llama3"), _no_report, "says what is kept"),
    "no file": (lambda t: t / "none.gguf", None, "not readable as GGUF"),
    "no GGUF": (lambda t: t / "model" / "config.json", None, "not readable as GGUF"),
}


@pytest.mark.parametrize("name", WRONG_PARENTS)
def test_wrong_parents(name: str, tmp_path: Path) -> None:
    make, change, message = WRONG_PARENTS[name]
    save_pruned(tmp_path / "model", "llama3")
    if change is not None:
        change(tmp_path / "model")
    parent = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        to_gguf_from_parent(tmp_path / "model", parent, tmp_path / "cut.gguf")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_pruned_files_cannot_be_cut_again(tmp_path: Path) -> None:
    exported(tmp_path, "llama3")
    with pytest.raises(
        ValueError, match=r"dense model of architecture .*, got 'deci'; leave out --gguf-parent"
    ):
        to_gguf_from_parent(tmp_path / "model", tmp_path / "model.gguf", tmp_path / "cut.gguf")
