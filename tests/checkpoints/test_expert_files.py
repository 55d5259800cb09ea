"""Experts that are saved as a matrix each: sliced and streamed from files as if loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES
from surgery_cases import logits_of, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from bonsai_fast.checkpoints.meta_model import open_parent
from bonsai_fast.checkpoints.streaming import open_streamed
from bonsai_fast.models import ExpertsBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.surgery import remove_units, save_pretrained, slice_checkpoint

# one with a matrix for each expert and another prefix, one with correction biases, one fused
SAVED = ["mixtral", "glm4_moe", "gpt_oss"]


def keep_some(layout: Layout) -> torch.Tensor:
    """All but the first two experts, or the first four channels, of every mixture."""
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if isinstance(group.block, ExpertsBlock):
            keep[group.start : group.start + (2 if group.kind == "expert" else 4)] = False
    return keep


@pytest.fixture(params=SAVED)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = MIXTURES[request.param]()
    save_pretrained(model, tmp_path / "parent")
    return model, tmp_path / "parent"


def test_tensors_of_a_saved_mixture(saved: tuple[PreTrainedModel, Path]) -> None:
    """Joined from files, block by block and one expert alone."""
    model, path = saved
    state = model.state_dict()
    parent = open_parent(path)
    assert parent.tensors.keys() == state.keys() and not parent.unknown
    for name, stored in parent.tensors.items():
        read = torch.empty_like(state[name])
        for first, block in stored.blocks(256):
            read[first : first + len(block)] = block
        assert torch.equal(read, state[name]), name
        if read.dim() == 3:
            assert torch.equal(stored.row(1, 256), state[name][1])


@pytest.mark.parametrize("experts", ["expert", "channel"])
def test_sliced_on_disk_is_the_same_to_the_byte(
    saved: tuple[PreTrainedModel, Path], experts: str
) -> None:
    model, path = saved
    layout = Layout.of(model, experts=experts)
    keep = keep_some(layout)
    slice_checkpoint(path, keep, path.parent / "sliced", experts=experts)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    save_pretrained(remove_units(loaded, layout, keep), path.parent / "removed")
    for made in ("model.safetensors", "config.json"):
        files = [(path.parent / folder / made).read_bytes() for folder in ("sliced", "removed")]
        assert files[0] == files[1], made


def test_streamed_from_files_of_single_experts(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    streamed = open_streamed(path)
    assert torch.equal(logits_of(streamed, tokens()), logits_of(model, tokens()))
    layout = Layout.of(model)
    masks = torch.stack([keep_some(layout), torch.ones(len(layout), dtype=torch.bool)])
    scores = [MaskScorer(each).score(masks, tokens()) for each in (model, streamed)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-6)
    save_pretrained(streamed, path.parent / "again")
    files = [
        (folder / "model.safetensors").read_bytes() for folder in (path, path.parent / "again")
    ]
    assert files[0] == files[1]
