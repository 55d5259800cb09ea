"""Runs text through a model's own decoder layers, each over all of the text before the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.memory import default_budget, parse_bytes
from bonsai_fast.evaluation.perplexity import Perplexity, perplexity_of
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods.weights.hidden_states import HiddenStates
from bonsai_fast.methods.weights.residence import resident
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.scoring.sequence_nll import evaluation_mode
from bonsai_fast.scoring.working_set import MAX_TOKENS, WorkingSet

# tokens that tell whether layers return tuples
PROBE_TOKENS = 2
# (number of the layer, its own forward, arguments, keywords) -> what the layer returns
Act = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Call:
    """How the model calls a layer, beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.arguments, self.keywords))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class Sweep:
    """Text on its way through a model: the hidden states behind the layers that it has passed.

    The model's own code embeds the text, says with which masks and positions it calls each layer,
    and finishes the text behind the last one; its layers are run by this class alone. A layer is on
    the device while it runs, embeddings and LM head are there at the beginning and the end, and
    everything else stays where it is.

    Args:
        model: a causal language model, on any device.
        input_ids: int64 [B, T], no padding.
        device: where layers run; the model's own if None.
        memory_budget: bytes for hidden states and one batch, beside weights; "2GiB" is understood.
            States that do not fit lie in a file.
        folder: where that file is made.
    Raises:
        ValueError: the budget does not hold one sequence, or the model tells its layers something
            about the text beside its hidden states.
        UnsupportedModelError: the model has no decoder that we know.
        OSError: the disk has no room for the states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        device: torch.device | None = None,
        memory_budget: int | str | None = None,
        folder: Path,
    ) -> None:
        self.model, self.input_ids = model, input_ids
        self.device = model.device if device is None else device
        layout = Layout.of(model)
        self.layers = list(model.get_submodule(layout.decoder.path).children())
        self._nll = SequenceNLL(model)
        self._num_passed = 0
        sequences, length = input_ids.shape
        needs = WorkingSet.of(layout, self._nll, length)
        budget = _budget(memory_budget, self.device)
        _check_budget(needs, budget, length)
        with self._outside(), torch.no_grad(), evaluation_mode(model):
            self._returns_tuple = self._probe(input_ids[:1, :PROBE_TOKENS])
            first = self._calls_of(input_ids[:1])[0]
            size = first.numel() * sequences * first.element_size()
            rest = budget - size if budget - size >= _least(needs) else budget
            limit = MAX_TOKENS.get(self.device.type, MAX_TOKENS["cpu"]) // length
            rows = max(1, min(needs.rows_within(rest), limit, sequences))
            self.batches = [
                slice(start, min(start + rows, sequences)) for start in range(0, sequences, rows)
            ]
            self._states = HiddenStates(
                (sequences, length, first.shape[-1]),
                first.dtype,
                device=self.device,
                room=budget - rest,
                folder=folder,
            )
            self._calls: dict[int, list[Call]] = {}
            for batch in self.batches:
                states, calls = self._calls_of(input_ids[batch])
                self._states[batch] = states
                self._check_alike(self._calls.setdefault(len(states), calls), calls)
            flipped = input_ids[self.batches[0]].flip(1)
            self._check_alike(self._calls[len(flipped)], self._calls_of(flipped)[1])

    def read(self, number: int) -> None:
        """Run the next layer without passing it: for whoever hooks into it."""
        self._run(number, passes=False)

    def advance(self, number: int) -> None:
        """Pass the next layer; its number is given to be sure."""
        self._run(number, passes=True)
        self._num_passed += 1

    def losses(self) -> Tensor:
        """Next-token losses behind the last layer, mean nats of every sequence: float32 [B]."""
        assert self._num_passed == len(self.layers), "some layers have not been passed"
        losses = []
        with self._outside(), torch.no_grad(), evaluation_mode(self.model):
            for batch in self.batches:
                states, input_ids = self._states[batch], self.input_ids[batch].to(self.device)

                def act(*_: Any, states: Tensor = states) -> Any:
                    return self._as_returned(states)

                with acting(self.layers, act):
                    last = self._backbone(input_ids)
                losses.append(self._nll.losses_of(last, input_ids).cpu())
        return torch.cat(losses)

    def _run(self, number: int, *, passes: bool) -> None:
        assert number == self._num_passed, f"expected layer {self._num_passed}, got {number}"
        layer = self.layers[number]
        with resident(layer, self.device), torch.no_grad(), evaluation_mode(self.model):
            for batch in self.batches:
                states = self._states[batch]
                call = self._calls[len(states)][number]
                output = layer(states, *call.arguments, **call.keywords)
                if passes:
                    self._states[batch] = output[0] if isinstance(output, tuple) else output

    def _outside(self) -> Any:
        """Inside, all but the decoder layers is on the device."""
        return resident(self.model, self.device, without=self.layers)

    def _backbone(self, input_ids: Tensor) -> Tensor:
        found = self.model.base_model(input_ids=input_ids.to(self.device), use_cache=False)
        states: Tensor = found.last_hidden_state
        return states

    def _as_returned(self, states: Tensor) -> Any:
        return (states, None) if self._returns_tuple else states

    def _probe(self, input_ids: Tensor) -> bool:
        """Whether layers return tuples, from running the first one on a few tokens."""
        returned: list[Any] = []

        def act(
            _: int, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: Any
        ) -> Any:
            if not returned:
                with resident(self.layers[0], self.device):
                    returned.append(forward(*arguments, **keywords))
            return returned[0]

        with acting(self.layers, act):
            self._backbone(input_ids)
        return isinstance(returned[0], tuple)

    def _calls_of(self, input_ids: Tensor) -> tuple[Tensor, list[Call]]:
        """What flows into the first layer, [b, T, D], and how every layer is called."""
        first: list[Tensor] = []
        calls: list[Call] = []

        def act(_: int, __: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            states = arguments[0] if arguments else keywords["hidden_states"]
            others = {name: x for name, x in keywords.items() if name != "hidden_states"}
            calls.append(Call(arguments[1:], others))
            first.append(states)
            return self._as_returned(states)

        with acting(self.layers, act):
            self._backbone(input_ids)
        if len(calls) != len(self.layers):
            raise ValueError(
                f"{type(self.model).__name__}: expected each of its {len(self.layers)} layers to "
                f"be called once, got {len(calls)} calls"
            )
        return first[0], calls

    def _check_alike(self, calls: list[Call], others: list[Call]) -> None:
        for number, (call, other) in enumerate(zip(calls, others, strict=True)):
            pairs = zip(call.tensors, other.tensors, strict=True)
            if not all(one is two or torch.equal(one, two) for one, two in pairs):
                raise ValueError(
                    f"{type(self.model).__name__}: layer {number} is told more about the text than "
                    f"its hidden states; it cannot be run alone"
                )


def check_memory(
    model: PreTrainedModel,
    length: int,
    *,
    device: torch.device | None = None,
    memory_budget: int | str | None = None,
) -> None:
    """Raise ValueError if a `Sweep` over sequences of `length` tokens would not fit its budget."""
    needs = WorkingSet.of(Layout.of(model), SequenceNLL(model), length)
    _check_budget(needs, _budget(memory_budget, device or model.device), length)


def _budget(memory_budget: int | str | None, device: torch.device) -> int:
    return default_budget(device) if memory_budget is None else parse_bytes(memory_budget)


def _least(needs: WorkingSet) -> int:
    """Bytes for one sequence."""
    return max(needs.mask + needs.layer, needs.logits + needs.hidden)


def _check_budget(needs: WorkingSet, budget: int, length: int) -> None:
    if budget < _least(needs):
        raise ValueError(
            f"memory budget: one sequence of {length} tokens needs about "
            f"{-(-_least(needs) // 2**20)} MiB beside the weights, "
            f"got a budget of {budget / 2**20:.0f} MiB"
        )


@contextmanager
def acting(layers: list[nn.Module], act: Act) -> Iterator[None]:
    """Inside, a function acts in the place of every layer."""
    try:
        for number, layer in enumerate(layers):
            forward = layer.forward

            def instead(
                *arguments: Any, number: int = number, forward: Any = forward, **keywords: Any
            ) -> Any:
                return act(number, forward, arguments, keywords)

            vars(layer)["forward"] = instead
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def sweep_perplexity(
    model: PreTrainedModel,
    sequences: Sequences,
    *,
    device: torch.device | None = None,
    memory_budget: int | str | None = None,
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """The same as `evaluation.perplexity`, with one layer at a time on the device.

    Args:
        model, device, memory_budget, folder: as in `Sweep`.
        sequences: the text.
        advance: told of every layer that is done.
    """
    sweep = Sweep(
        model, sequences.input_ids, device=device, memory_budget=memory_budget, folder=folder
    )
    for number in range(len(sweep.layers)):
        sweep.advance(number)
        advance(1)
    return perplexity_of(sweep.losses(), sequences)
