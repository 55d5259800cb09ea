"""slice_checkpoint writes the bytes that load, remove_units and save_pretrained write."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from full_disk import small_files
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from surgery_cases import MASKS, bytes_of
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import bonsai_fast as bf
from bonsai_fast.methods import resolve
from bonsai_fast.models.layout import Layout
from bonsai_fast.runs.directory import open_run
from bonsai_fast.runs.mask_files import save_mask
from bonsai_fast.surgery import __main__ as command
from bonsai_fast.surgery import remove_units, save_pretrained, slice_checkpoint

REPORT = {"parent": "some/model"}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def the_long_way(parent: Path, mask: str, output: Path, **layout: object) -> dict[str, bytes]:
    """Load, cut, save."""
    model = AutoModelForCausalLM.from_pretrained(parent, dtype="auto")
    units = Layout.of(model, **layout)
    smaller = remove_units(model, units, MASKS[mask](units))
    save_pretrained(smaller, output, report=REPORT)
    return files_of(output)


def keep_for(model: PreTrainedModel, mask: str, **layout: object) -> torch.Tensor:
    return MASKS[mask](Layout.of(model, **layout))


def assert_same(actual: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if actual[name] != expected[name]]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_load_cut_save(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]().bfloat16()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "parent", max_shard_size="20KB")
    assert len(list((tmp_path / "parent").glob("*.safetensors"))) > 1
    for mask in ("irregular", "first attention gone", "everything gone"):
        expected = the_long_way(tmp_path / "parent", mask, tmp_path / f"{mask} long")
        output = tmp_path / f"{mask} short"
        slice_checkpoint(tmp_path / "parent", keep_for(model, mask), output, report=REPORT)
        assert_same(files_of(output), expected)


@pytest.mark.parametrize("family", ["llama3", "phi3", "gpt_neox"])
def test_other_layouts_and_a_parent_that_was_pruned_before(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    units = Layout.of(model)
    pruned = remove_units(model, units, MASKS["most"](units))
    save_pretrained(pruned, tmp_path / "parent")
    options = {"attention": "kv-group", "sublayers": True}
    keep = keep_for(pruned, "half", **options)
    expected = the_long_way(tmp_path / "parent", "half", tmp_path / "long", **options)
    slice_checkpoint(tmp_path / "parent", keep, tmp_path / "short", report=REPORT, **options)
    assert_same(files_of(tmp_path / "short"), expected)


def test_keeping_everything_copies_the_weights(tmp_path: Path) -> None:
    model = FAMILIES["llama3"]().half()
    model.save_pretrained(tmp_path / "parent")
    keep = torch.ones(len(Layout.of(model)), dtype=torch.bool)
    slice_checkpoint(tmp_path / "parent", keep, tmp_path / "short")
    same = ("model.safetensors", "config.json", "generation_config.json")
    parent, short = files_of(tmp_path / "parent"), files_of(tmp_path / "short")
    assert [name for name in same if parent[name] != short[name]] == []


@pytest.mark.parametrize("size", ["1KB", "15KB"])
def test_shards_are_those_of_transformers(size: str, tmp_path: Path) -> None:
    model = FAMILIES["qwen3"]()
    model.save_pretrained(tmp_path / "parent")
    units = Layout.of(model)
    keep = MASKS["half"](units)
    remove_units(model, units, keep).save_pretrained(tmp_path / "long", max_shard_size=size)
    slice_checkpoint(tmp_path / "parent", keep, tmp_path / "short", max_shard_size=size)
    actual = files_of(tmp_path / "short")
    del actual["README.md"], actual["bonsai_report.json"]
    assert len([name for name in actual if name.endswith(".safetensors")]) > 2
    assert_same(actual, files_of(tmp_path / "long"))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    parent = save_tiny_parent(tmp_path / "parent")
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    keep = keep_for(tiny_llama(), "half")
    slice_checkpoint(parent, keep, tmp_path / "short")
    assert (tmp_path / "short" / "additional_chat_templates" / "tool.jinja").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "short")
    assert tokenizer("units")["input_ids"] == byte_tokenizer()("units")["input_ids"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "short")


# What checkpoints may look like ------------------------------------------------------------------


def rewrite(parent: Path, change: object, metadata: dict[str, str] | None = None) -> None:
    """Save a parent's weights again after change(weights)."""
    weights = load_file(parent / "model.safetensors")
    change(weights)
    save_file(weights, parent / "model.safetensors", metadata=metadata or {"format": "pt"})


def saved(family: str, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent", model


@pytest.mark.parametrize("family", ["bloom", "gpt_neox", "opt"])
def test_a_checkpoint_of_the_base_model(family: str, tmp_path: Path) -> None:
    """Published BLOOM weights lack the prefix `transformer.`; its head is tied."""
    parent, model = saved(family, tmp_path)
    prefix = f"{model.base_model_prefix}."

    def strip(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix(prefix)] = weights.pop(name)

    rewrite(parent, strip)
    expected = the_long_way(parent, "half", tmp_path / "long")
    slice_checkpoint(parent, keep_for(model, "half"), tmp_path / "short", report=REPORT)
    assert_same(files_of(tmp_path / "short"), expected)


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_copy_of_a_tied_tensor(equal: bool, tmp_path: Path) -> None:
    """An equal one goes, another one stays: so does loading."""
    parent, model = saved("llama3", tmp_path)

    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1 if equal else 2)

    rewrite(parent, add)
    expected = the_long_way(parent, "irregular", tmp_path / "long")
    slice_checkpoint(parent, keep_for(model, "irregular"), tmp_path / "short", report=REPORT)
    assert_same(files_of(tmp_path / "short"), expected)
    with safe_open(tmp_path / "short" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not equal  # noqa: SIM118


def test_weights_in_another_dtype_than_the_configuration_says(tmp_path: Path) -> None:
    parent, model = saved("llama", tmp_path)
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    expected = the_long_way(parent, "half", tmp_path / "long")
    slice_checkpoint(parent, keep_for(model, "half"), tmp_path / "short", report=REPORT)
    assert_same(files_of(tmp_path / "short"), expected)
    del config["dtype"]
    (parent / "config.json").write_text(json.dumps(config))
    rewrite(parent, lambda weights: weights.update({k: v.half() for k, v in weights.items()}))
    expected = the_long_way(parent, "half", tmp_path / "long16")
    slice_checkpoint(parent, keep_for(model, "half"), tmp_path / "short16", report=REPORT)
    assert_same(files_of(tmp_path / "short16"), expected)


def test_unknown_tensors_and_metadata_stay_and_outdated_buffers_go(tmp_path: Path) -> None:
    parent, model = saved("gpt_neox", tmp_path)
    extra = {
        "value_head.weight": torch.arange(6, dtype=torch.float64).view(2, 3),
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 4, dtype=torch.float8_e4m3fn),
    }
    outdated = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(3),
    }
    expected = the_long_way(parent, "half", tmp_path / "long")
    rewrite(
        parent,
        lambda weights: weights.update(extra | outdated),
        {"format": "pt", "source": "here"},
    )
    keep = keep_for(model, "half")
    result = slice_checkpoint(parent, keep, tmp_path / "short", report=REPORT)
    assert set(result.unknown_tensors) == extra.keys()
    weights = load_file(tmp_path / "short" / "model.safetensors")
    for name, tensor in extra.items():
        found = weights.pop(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert bytes_of(found) == bytes_of(tensor)
    assert save(weights, {"format": "pt"}) == expected["model.safetensors"]
    with safe_open(tmp_path / "short" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "source": "here"}


# Errors, and writes that go wrong ----------------------------------------------------------------


def test_what_is_refused(tmp_path: Path) -> None:
    parent, model = saved("llama", tmp_path)
    keep = keep_for(model, "half")
    output = tmp_path / "short"
    with pytest.raises(ValueError, match=rf"expected shape \[P\] with P = {len(keep)} units"):
        slice_checkpoint(parent, keep[1:], output)
    with pytest.raises(TypeError, match="expected dtype bool"):
        slice_checkpoint(parent, keep.int(), output)
    with pytest.raises(ValueError, match="expected the directory of a saved model"):
        slice_checkpoint(tmp_path / "nowhere", keep, output)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no model that bonsai_fast saved"):
        slice_checkpoint(parent, keep, tmp_path / "mine")
    slice_checkpoint(parent, keep, tmp_path / "there")
    with pytest.raises(FileExistsError, match="holds a saved model"):
        slice_checkpoint(parent, keep, tmp_path / "there")
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("model.norm.weight"),
            r"expected a tensor model\.norm\.weight, found none",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight has shape \(3,\), expected \(48,\) by the configuration",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_their_configuration(
    change: object, message: str, tmp_path: Path
) -> None:
    parent, model = saved("llama", tmp_path)
    rewrite(parent, change)
    with pytest.raises(ValueError, match=message):
        slice_checkpoint(parent, keep_for(model, "half"), tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    parent, model = saved("llama", tmp_path)
    keep = keep_for(model, "half")
    weights = parent / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="cannot be opened"):
        slice_checkpoint(parent, keep, tmp_path / "short")
    weights.rename(parent / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected model\.safetensors or"):
        slice_checkpoint(parent, keep, tmp_path / "short")
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (parent / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is missing, which"):
        slice_checkpoint(parent, keep, tmp_path / "short")
    (parent / "pytorch_model.bin").rename(weights)
    weights.write_bytes(content)
    config = json.loads((parent / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized"):
        slice_checkpoint(parent, keep, tmp_path / "short")


def test_a_full_disk_is_said_before_and_during_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, model = saved("llama", tmp_path)
    keep = keep_for(model, "half")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
        with pytest.raises(OSError, match=r"could not save .*: the disk is full: .* are needed"):
            slice_checkpoint(parent, keep, tmp_path / "short")
    message = r"could not save the model to .*short: "
    with small_files(), pytest.raises(OSError, match=message) as caught:
        slice_checkpoint(parent, keep, tmp_path / "short")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_stop_in_the_middle_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, model = saved("llama", tmp_path)
    seen = []

    def stop(tensor: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
        seen.append(tensor)
        if len(seen) > 5:
            raise error
        return tensor.index_select(dim, index)

    # the function has the name of its module
    monkeypatch.setattr(sys.modules[slice_checkpoint.__module__], "take", stop)
    with pytest.raises(type(error)):
        slice_checkpoint(parent, keep_for(model, "half"), tmp_path / "short")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


# The command -------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mask of a run cuts the run's parent."""
    parent = save_tiny_parent(tmp_path / "parent")
    options = {"attention": "kv-group", "sublayers": True}
    expected = the_long_way(parent, "most", tmp_path / "long", **options)
    model = AutoModelForCausalLM.from_pretrained(parent)
    layout = Layout.of(model, **options)
    run = open_run(tmp_path / "run", resolve(bf.PruneConfig()), layout, model, "text")
    run.save_mask("final", MASKS["most"](layout))
    mask = tmp_path / "run" / "masks" / "final.safetensors"
    assert command.main([str(parent), str(mask), str(tmp_path / "short")]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["output"] == str(tmp_path / "short") and "saved to" in said.err
    assert result["parameters"] < result["parameters_dense"]
    actual = files_of(tmp_path / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert actual.pop(name) == (parent / name).read_bytes()
    for name in ("README.md", "bonsai_report.json"):
        del actual[name], expected[name]
    assert_same(actual, expected)
    report = json.loads((tmp_path / "short" / "bonsai_report.json").read_text())
    assert report["parent"] == str(parent) and len(report["kept"]) == 4

    assert command.main([str(parent), str(mask), str(tmp_path / "short")]) == 2
    assert command.main([str(parent), str(parent), str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "holds a saved model" in errors[0] and "expected a mask" in errors[1]
    with pytest.raises(SystemExit) as caught:
        command.main([str(parent)])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ")


_MEASURE = """
import resource, sys
import torch
from bonsai_fast.runs.mask_files import load_mask
from bonsai_fast.surgery import slice_checkpoint

parent, mask, output = sys.argv[1:]
mask = load_mask(mask)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
slice_checkpoint(parent, mask.keep, output)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Mapped pages count, too: they are given back."""
    sizes = {"hidden_size": 1020, "intermediate_size": 4100, "num_hidden_layers": 5, "head_dim": 64}
    parent = save_tiny_parent(tmp_path / "parent", **sizes)
    size = (parent / "model.safetensors").stat().st_size
    assert size > 250e6
    layout = Layout.of(AutoModelForCausalLM.from_pretrained(parent))
    save_mask(tmp_path / "mask", layout, MASKS["most"](layout))
    arguments = [str(parent), str(tmp_path / "mask"), str(tmp_path / "short")]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _MEASURE, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # two blocks of 16 MiB, one on either side of the cut, and the modules imported on the way
    assert int(done.stdout) * 1024 < 100e6 < size / 2.5
