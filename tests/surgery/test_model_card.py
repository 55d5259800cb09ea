"""The card of a saved model: what its metadata and text say, and that its code loads the model."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from surgery_cases import MASKS
from tiny import byte_tokenizer, save_tiny_parent
from transformers import AutoModelForCausalLM, PreTrainedModel

from bonsai_fast import hub
from bonsai_fast.export import to_decilm, to_padded
from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units, save_pretrained, slice_checkpoint
from bonsai_fast.surgery.model_card import record_measurements
from bonsai_fast.surgery.parent_card import find_parent

PARENT_CARD = """---
license: other
license_name: tiny
license_link: LICENSE.md
language: [en, de]
base_model: some/grandparent
---
The parent's own words.
"""
MEASURED = {
    "parameters_dense": 1_234_567,
    "dense_perplexity": 8.125,
    "pruned_perplexity": 11.5,
    "protocol": {
        "dataset": "wikitext2",
        "tokens": 4095,
        "window": 512,
        "stride": 256,
        "sha256": "abc123",
    },
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with a card of its own."""
    directory = save_tiny_parent(tmp_path_factory.mktemp("models") / "tiny-llama")
    (directory / "README.md").write_text(PARENT_CARD)
    return directory


def channels_alone(layout: Layout) -> torch.Tensor:
    """Uneven MLPs; every attention stays whole."""
    keep = MASKS["half"](layout)
    for group in layout.groups:
        if isinstance(group.block, AttentionBlock):
            keep[group.start : group.stop] = True
    return keep


def even(layout: Layout) -> torch.Tensor:
    """What the parent's own class can express."""
    return torch.tensor([unit.kind == "head" or unit.index < 64 for unit in layout])


def cut(parent: Path, output: Path, mask: Any = channels_alone) -> PreTrainedModel:
    """Prune by hand and save."""
    model = AutoModelForCausalLM.from_pretrained(parent)
    layout = Layout.of(model)
    smaller = remove_units(model, layout, mask(layout))
    save_pretrained(smaller, output, tokenizer=byte_tokenizer())
    return smaller


def metadata(directory: Path) -> dict[str, Any]:
    return ModelCard.load(directory / "README.md").data.to_dict()


def text(directory: Path) -> str:
    return ModelCard.load(directory / "README.md").text


def code(directory: Path) -> str:
    return re.findall(r"```python\n(.+?)```", text(directory), re.DOTALL)[0]


def run_code(script: str, directory: Path, modules: Path) -> int:
    """Run a card's code in its directory, in a new process that nobody answers: parameters."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(hub.__file__).parents[2]),
        "HF_MODULES_CACHE": str(modules),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{script}\nprint(model.num_parameters())"],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[y/N]" not in done.stdout
    return int(done.stdout.splitlines()[-1])


def test_a_model_pruned_by_hand(parent: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(parent)
    smaller = cut(parent, tmp_path / "model")
    assert metadata(tmp_path / "model") == {
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE.md",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "bonsai_fast"],
    }
    said = text(tmp_path / "model")
    assert "# tiny-llama, pruned" in said and "own words" not in said
    assert f"| parameters | {model.num_parameters():,} | {smaller.num_parameters():,} |" in said
    shapes = smaller.config.layer_shapes()
    kept = sum(shape.channels for shape in shapes)
    assert f"Kept: 24 of 24 query heads, 8 of 8 KV heads, {kept} of 512 MLP channels." in said
    for index, shape in enumerate(shapes):
        assert f"\n| {index} | 6 | 2 | {shape.channels} |" in said
    assert "perplexity" not in said and "The parent's: tiny." in said


def test_its_code_loads_the_model(parent: Path, tmp_path: Path) -> None:
    """With the package; and without, as the card says."""
    smaller = cut(parent, tmp_path / "model")
    script = code(tmp_path / "model")
    assert script.startswith("import bonsai_fast")
    size = smaller.num_parameters()
    assert run_code(script, tmp_path / "model", tmp_path / "modules") == size
    alone = script.replace("import bonsai_fast", "import sys; sys.modules['bonsai_fast'] = None")
    alone = alone.replace("'.'", "'.', trust_remote_code=True")
    assert run_code(alone, tmp_path / "model", tmp_path / "modules") == size


def test_a_stock_result_loads_with_transformers_alone(parent: Path, tmp_path: Path) -> None:
    smaller = cut(parent, tmp_path / "model", even)
    script, said = code(tmp_path / "model"), text(tmp_path / "model")
    assert "bonsai_fast" not in script and "trust_remote_code" not in said
    assert "| parent | 6 | 2 | 128 |" in said and "| 0 to 3 | 6 | 2 | 64 |" in said
    assert run_code(script, tmp_path / "model", tmp_path / "modules") == smaller.num_parameters()


def test_a_sliced_checkpoint_says_the_same(parent: Path, tmp_path: Path) -> None:
    smaller = cut(parent, tmp_path / "long")
    layout = Layout.of(AutoModelForCausalLM.from_pretrained(parent))
    slice_checkpoint(parent, channels_alone(layout), tmp_path / "short", max_shard_size="20KB")
    assert len(list((tmp_path / "short").glob("*.safetensors"))) > 1
    assert (tmp_path / "short" / "README.md").read_text() == (
        tmp_path / "long" / "README.md"
    ).read_text()
    assert f"{smaller.num_parameters():,}" in text(tmp_path / "short")


def test_measurements_are_added_later(parent: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(parent)
    report = {
        "parent": {"name": "owner/tiny"},
        "method": "wanda",
        "pattern": "2:4",
        "preset": None,
        "seed": 3,
    }
    save_pretrained(model, tmp_path / "model", report=report)
    record_measurements(tmp_path / "model", MEASURED)
    written = json.loads((tmp_path / "model" / "bonsai_report.json").read_text())
    assert written == {"written_by": "bonsai_fast", **report, "measured": MEASURED}
    found, said = metadata(tmp_path / "model"), text(tmp_path / "model")
    assert found["base_model"] == "owner/tiny" and found["tags"][-1] == "wanda"
    assert "license" not in found and "look it up" in said
    assert "| parameters | 1,234,567 |" in said and "| perplexity | 8.12 | 11.50 |" in said
    assert "`wikitext2`: 4,095 predicted tokens, windows of 512 tokens, stride 256" in said
    assert "abc123" in said and "pattern `2:4`" in said and "seed `3`." in said
    assert "preset" not in said and "AutoTokenizer" not in said
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "README.md",
        "bonsai_report.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_exports_are_described_by_what_they_were_made_from(parent: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(parent)
    layout = Layout.of(model)
    smaller = remove_units(model, layout, channels_alone(layout))
    save_pretrained(smaller, tmp_path / "model", report={"parent": "a/b", "method": "flap"})
    record_measurements(tmp_path / "model", MEASURED)
    to_padded(tmp_path / "model", tmp_path / "padded")
    to_decilm(tmp_path / "model", tmp_path / "decilm")
    for name in ("padded", "decilm"):
        assert metadata(tmp_path / name)["base_model"] == "a/b"
        assert metadata(tmp_path / name)["tags"] == ["pruned", "bonsai_fast", "flap"]
        said = text(tmp_path / name)
        assert "| perplexity | 8.12 | 11.50 |" in said
        assert f"| 3 | 6 | 2 | {smaller.config.layer_shapes()[3].channels} |" in said
    assert "padded with zeros" in text(tmp_path / "padded")
    assert "bonsai_fast" not in code(tmp_path / "padded")
    run_code(code(tmp_path / "padded"), tmp_path / "padded", tmp_path / "modules")
    assert "DeciLM" in text(tmp_path / "decilm") and "vllm" in code(tmp_path / "decilm")


def test_a_model_pruned_twice_names_the_parent_of_its_parent(parent: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(parent)
    save_pretrained(model, tmp_path / "once", report={"parent": "owner/tiny"})
    cut(tmp_path / "once", tmp_path / "twice")
    assert metadata(tmp_path / "twice")["base_model"] == "owner/tiny"


def test_who_the_parent_is(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name or directory, and without a network."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert find_parent("owner/name").hub_id == "owner/name"
    assert find_parent(str(parent)).hub_id is None and find_parent(str(parent)).name == "tiny-llama"
    assert find_parent("/gone/away").hub_id is None and find_parent("/gone/away").name == "away"
    cached = find_parent("/cache/models--owner--na--me/snapshots/0123")
    assert cached.hub_id == "owner/na--me"


@pytest.mark.parametrize(
    "card", ["---\n[1, 2\n---\n", "---\n- a\n---\n", "---\ntags: 1\n---\n", "no metadata"]
)
def test_a_damaged_card_of_the_parent_is_no_obstacle(card: str, tmp_path: Path) -> None:
    directory = save_tiny_parent(tmp_path / "parent")
    (directory / "README.md").write_text(card)
    cut(directory, tmp_path / "model")
    assert metadata(tmp_path / "model")["tags"] == ["pruned", "bonsai_fast"]
    assert "license" not in metadata(tmp_path / "model")
