"""Text goes through a model layer by layer and comes out as from the model itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, llama, opt
from full_disk import small_files
from torch import nn
from weight_cases import random_text

from bonsai_fast.checkpoints.streaming import exchanged_weights, stream_layers, stream_of
from bonsai_fast.layerwise import (
    InputRecorder,
    Sweep,
    UnusableInputsError,
    sweep,
    sweep_losses,
)
from bonsai_fast.layerwise.hidden_states import HiddenStates
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import SequenceNLL


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: x for name, x in layer.named_modules() if isinstance(x, nn.Linear)}


@pytest.fixture(autouse=True)
def two_sequences_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences of twelve tokens: two whole batches and half of one."""
    monkeypatch.setitem(sweep.MAX_TOKENS, "cpu", 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_losses_as_the_model(family: str, tmp_path: Path) -> None:
    model, text = FAMILIES[family](), random_text(97)
    passed = Sweep(model, text.input_ids, folder=tmp_path)
    assert [len(range(*batch.indices(5))) for batch in passed.batches] == [2, 2, 1]
    for number in range(len(passed.layers)):
        passed.read(number)  # changes nothing
        passed.advance(number)
    torch.testing.assert_close(
        passed.losses(), SequenceNLL(model)(text.input_ids), rtol=1e-5, atol=1e-5
    )
    # the model is its own again
    assert all("forward" not in vars(layer) for layer in passed.layers)
    torch.testing.assert_close(
        sweep_losses(model, text.input_ids, folder=tmp_path), passed.losses(), rtol=0, atol=0
    )


@pytest.mark.parametrize("family", ["llama3", "phi3", "bloom", "gpt_neox"])
def test_inputs_are_what_the_layers_read(family: str, tmp_path: Path) -> None:
    """Moments and Gram matrices against all inputs side by side, fused projections included."""
    model, text = FAMILIES[family](), random_text(97)
    passed = Sweep(model, text.input_ids, folder=tmp_path)
    passed.advance(0)
    linears = linears_of(passed.layers[1])
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].flatten(0, 1))
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(input_ids=text.input_ids)
    for hook in hooks:
        hook.remove()
    moments, grams = InputRecorder(linears, "moments"), InputRecorder(linears, "gram")
    with moments, grams:
        passed.read(1)
        assert not moments._first_pass and not grams._first_pass  # no inputs are held for longer
    for name, states in seen.items():
        states, tokens = states.double(), 5 * 12
        gram = grams.of(name).gram
        assert gram is not None and moments.of(name).gram is None
        assert moments.of(name).num_tokens == grams.of(name).num_tokens == tokens
        torch.testing.assert_close(gram.double(), states.T @ states / tokens, rtol=1e-4, atol=1e-4)
        for recorder in (moments, grams):
            torch.testing.assert_close(
                recorder.of(name).root_mean_square, states.square().mean(0).sqrt(),
                rtol=1e-4, atol=1e-5,
            )  # fmt: skip
    # queries, keys and values share one record, each with its own name
    shared = sum(gram is other for gram in grams._sums.values() for other in grams._sums.values())
    assert shared == len(grams._sums) < len(linears) or family in ("bloom", "gpt_neox", "phi3")


@pytest.mark.parametrize("family", ["llama3", "bloom", "opt"])
@pytest.mark.parametrize("streamed", [False, True])
def test_outputs_of_a_layer_with_other_weights(family: str, streamed: bool, tmp_path: Path) -> None:
    """Any rows, and gradients into the weights that are given, not into the model's."""
    model, text = FAMILIES[family](), random_text(97)
    expected = model(text.input_ids, output_hidden_states=True, use_cache=False).hidden_states
    rows = torch.tensor([4, 0, 1])
    layer = Sweep(model, text.input_ids, folder=tmp_path).layers[1]
    expected[2][rows].square().sum().backward()
    gradients = {name: x.grad for name, x in layer.named_parameters()}
    given = {name: x.detach().clone().requires_grad_() for name, x in layer.named_parameters()}
    model.zero_grad(set_to_none=True)
    if streamed:
        stream_layers(model, device="cpu")
    passed = Sweep(model, text.input_ids, folder=tmp_path)
    passed.advance(0)
    torch.testing.assert_close(passed.states(rows), expected[1][rows].detach())
    with torch.enable_grad():
        found = passed.apply(1, passed.states(rows), given)
        found.square().sum().backward()
    torch.testing.assert_close(found, expected[2][rows])
    for name, x in given.items():
        torch.testing.assert_close(x.grad, gradients[name], rtol=1e-4, atol=1e-4)
    assert all(x.grad is None for x in model.parameters())
    passed.advance(1)
    torch.testing.assert_close(passed.states(slice(0, 5)), expected[2].detach())


def test_a_layer_is_told_apart_from_its_pruned_self(tmp_path: Path) -> None:
    """What a layer hands on comes from the weights that it has while it is passed."""
    model, text = llama(), random_text(97)
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.zero_()
    passed = Sweep(model, text.input_ids, folder=tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    zeros = {1: {name: torch.zeros_like(model.get_parameter(name))}}
    for number in range(3):
        with exchanged_weights(model, zeros.get):
            passed.advance(number)
    torch.testing.assert_close(passed.losses(), SequenceNLL(other)(text.input_ids))
    assert model.get_parameter(name).any()


def test_states_in_a_file_are_the_same_and_leave_nothing(tmp_path: Path) -> None:
    model, text = llama(), random_text(97)
    needs = sweep.WorkingSet.of(Layout.of(model), SequenceNLL(model), 12)
    least = max(needs.mask + needs.layer, needs.logits + needs.hidden)
    in_memory = Sweep(model, text.input_ids, folder=tmp_path)
    in_file = Sweep(model, text.input_ids, memory_budget=least, folder=tmp_path)
    assert in_memory._states.is_in_memory and not in_file._states.is_in_memory
    assert list(tmp_path.iterdir()) == []
    for number in range(3):
        in_memory.advance(number)
        in_file.advance(number)
    torch.testing.assert_close(in_file.losses(), in_memory.losses())
    with pytest.raises(ValueError, match="one sequence of 12 tokens needs about"):
        Sweep(model, text.input_ids, memory_budget=least - 1, folder=tmp_path)


def test_no_room_for_states_ends_in_an_error(tmp_path: Path) -> None:
    with small_files(), pytest.raises(OSError):
        HiddenStates(
            (100, 10, 10), torch.float32, device=torch.device("cpu"), room=0, folder=tmp_path
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("family", ["llama3", "phi3", "bloom", "opt"])
def test_a_streamed_model_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    model, text = FAMILIES[family](), random_text(97)
    streamed = stream_layers(FAMILIES[family](), device="cpu")
    grams, losses = [], []
    for each in (model, streamed):
        passed = Sweep(each, text.input_ids, folder=tmp_path)
        for number, layer in enumerate(passed.layers):
            recorder = InputRecorder(linears_of(layer), "gram")
            with recorder:
                passed.read(number)
            grams.append({name: recorder.of(name).gram for name in linears_of(layer)})
            passed.advance(number)
        losses.append(passed.losses())
    assert torch.equal(*losses)
    half = len(grams) // 2
    for expected, found in zip(grams[:half], grams[half:], strict=True):
        assert all(torch.equal(found[name], gram) for name, gram in expected.items())


def test_a_streamed_layer_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs outside the layers reads none but the first, to see what layers return."""
    model, text = stream_layers(opt(), device="cpu"), random_text(97)
    stream, seen = stream_of(model), []
    assert stream is not None
    read = stream._source.read
    monkeypatch.setattr(
        stream._source, "read", lambda layer, *rest: (seen.append(layer), read(layer, *rest))[1]
    )
    passed = Sweep(model, text.input_ids, folder=tmp_path)
    stream._worker.submit(int).result()
    assert len(passed.batches) == 3 and seen == [0, 1]
    for number in range(3):
        passed.read(number)
        passed.advance(number)
    passed.losses()
    stream._worker.submit(int).result()
    assert seen == [0, 1, 2, 0]


def test_layers_that_are_told_about_the_text_are_refused(tmp_path: Path) -> None:
    model, text = llama(), random_text(97)
    embed = model.model.embed_tokens

    class Told(nn.Module):
        """A layer that wants the tokens' embeddings once more."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.self_attn, self.mlp, self.layer = layer.self_attn, layer.mlp, layer

        def forward(self, hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
            keywords.pop("per_layer_input")
            found: torch.Tensor = self.layer(hidden_states, **keywords)
            return found

    class Backbone(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **keywords: Any) -> Any:
            from transformers.modeling_outputs import BaseModelOutputWithPast

            states = embed(input_ids)
            positions = torch.arange(input_ids.shape[1])[None]
            rotary = self.rotary_emb(states, position_ids=positions)
            for layer in self.layers:
                states = layer(
                    states, position_embeddings=rotary, attention_mask=None,
                    per_layer_input=embed(input_ids),
                )  # fmt: skip
            return BaseModelOutputWithPast(last_hidden_state=self.norm(states))

    model.model.layers = nn.ModuleList(Told(layer) for layer in model.model.layers)
    model.model.__class__ = Backbone
    with pytest.raises(ValueError, match="layer 0 needs inputs besides hidden_states"):
        Sweep(model, text.input_ids, folder=tmp_path)


def test_inputs_without_an_end_or_without_use(tmp_path: Path) -> None:
    model, text = llama(), random_text(97)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e38)
    passed = Sweep(model, text.input_ids, folder=tmp_path)
    linears = linears_of(passed.layers[0])
    recorder = InputRecorder({**linears, "unused": nn.Linear(2, 2)}, "moments")
    with recorder:
        passed.read(0)
    assert recorder.of("mlp.up_proj").num_tokens == 60
    with pytest.raises(UnusableInputsError, match=r"mlp.down_proj: its inputs hold NaN or Inf"):
        recorder.of("mlp.down_proj")
    with pytest.raises(UnusableInputsError, match="unused is not used"):
        recorder.of("unused")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama3", "opt", "bloom"])
def test_layers_visit_the_gpu(family: str, tmp_path: Path) -> None:
    text = random_text(97)
    model = stream_layers(FAMILIES[family](), device="cuda")
    passed = Sweep(model, text.input_ids, folder=tmp_path)
    for number, layer in enumerate(passed.layers):
        recorder = InputRecorder(linears_of(layer), "gram")
        with recorder:
            passed.read(number)
        assert all(recorder.of(name).gram.is_cuda for name in linears_of(layer))
        passed.advance(number)
    expected = SequenceNLL(FAMILIES[family]())(text.input_ids)
    torch.testing.assert_close(passed.losses(), expected, rtol=1e-3, atol=1e-3)
