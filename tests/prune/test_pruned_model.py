"""Every kind of pruned model: saved, loaded again, and refused if it computes something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import Origin, open_streamed
from bonsai_fast.console import Reporter
from bonsai_fast.delivery.pruned_model import PrunedModel, SlicedModel, SmallerModel, ZeroedModel
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import SavedModelError, remove_units

TOKENS = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(0))
# the layer that the tests below change
CHANGED = "model.layers.2.mlp.down_proj.weight"


def keep_of(layout: Layout) -> torch.Tensor:
    return torch.rand(len(layout), generator=torch.Generator().manual_seed(1)) < 0.7


def smaller(parent: Path, directory: Path) -> PrunedModel:
    model = tiny_llama()
    layout = Layout.of(model)
    cut = remove_units(model, layout, keep_of(layout))
    return SmallerModel(model, byte_tokenizer(), directory, Reporter(quiet=True), cut)


def sliced(parent: Path, directory: Path) -> PrunedModel:
    model = open_streamed(parent, device="cpu")
    layout = Layout.of(model)
    about = (layout, keep_of(layout), Origin(parent, False))
    return SlicedModel(model, byte_tokenizer(), directory, Reporter(quiet=True), *about)


def zeroed(parent: Path, directory: Path, model: PreTrainedModel | None = None) -> PrunedModel:
    own = tiny_llama().state_dict()

    def weights(number: int) -> dict[str, torch.Tensor]:
        layer = {n: w for n, w in own.items() if f".layers.{number}." in n and w.dim() == 2}
        return {name: torch.where(weight.abs() < 0.01, 0, weight) for name, weight in layer.items()}

    about = (byte_tokenizer(), directory, Reporter(quiet=True), weights, None)
    return ZeroedModel(model or tiny_llama(), *about)


def zeroed_streamed(parent: Path, directory: Path) -> PrunedModel:
    return zeroed(parent, directory, open_streamed(parent, device="cpu"))


@pytest.mark.parametrize("make", [smaller, sliced, zeroed, zeroed_streamed])
def test_saved_and_compared(make: Callable[[Path, Path], PrunedModel], tmp_path: Path) -> None:
    parent = save_tiny_parent(tmp_path / "parent")
    model = make(parent, tmp_path / "model")
    text = Sequences(TOKENS, "random", "random tokens")
    with torch.no_grad():
        dense = model.parent(input_ids=TOKENS).logits
    model.save({"seed": 3})
    assert model.check(TOKENS) <= 1e-4 * float(dense.abs().max())
    assert not torch.allclose(model.logits(TOKENS), dense)
    with model.pruned() as pruned:
        after = model.perplexity(pruned, text, "pruned").value
    assert after != model.perplexity(model.parent, text, "dense").value
    with torch.no_grad():  # the parent is what it was
        assert torch.equal(model.parent(input_ids=TOKENS).logits, dense)


@pytest.mark.parametrize("make", [smaller, sliced, zeroed_streamed])
def test_another_model_in_its_place_is_noticed(
    make: Callable[[Path, Path], PrunedModel], tmp_path: Path
) -> None:
    model = make(save_tiny_parent(tmp_path / "parent"), tmp_path / "model")
    model.save({})
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights[CHANGED] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SavedModelError, match="but its logits differ by"):
        model.check(TOKENS)
