"""Runs text through a model layer by layer: all of the text through one layer, then the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.memory import default_budget, parse_bytes
from bonsai_fast.checkpoints.streaming import bring_in_layer
from bonsai_fast.layerwise.hidden_states import HiddenStates
from bonsai_fast.layerwise.outside_layers import Call, OutsideLayers
from bonsai_fast.scoring.sequence_nll import evaluation_mode
from bonsai_fast.scoring.working_set import MAX_TOKENS, WorkingSet


class Sweep:
    """The hidden states of text after the layers that it has passed.

    The model's own code embeds the text, says with which masks and positions each layer is called,
    and computes what follows the last layer. In between, this class runs the layers. A streamed
    model reads each layer once for all of the text, and the next one meanwhile.

    Args:
        model: a causal language model, in memory or streamed.
        input_ids: int64 [B, T], no padding.
        memory_budget: bytes for hidden states and one batch, besides weights, such as "2GiB"; a
            default that depends on the device if None. States that do not fit are kept in a file.
        folder: where that file is made.
        most_rows: limit for the sequences of one batch.
    Attributes:
        layers: the decoder layers.
        batches: the sequences that are run at once.
    Raises:
        ValueError: the budget does not hold one sequence, or a layer needs inputs besides its
            hidden states that depend on the text.
        UnsupportedModelError: no known decoder.
        OSError: the disk has no room for the states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        memory_budget: int | str | None = None,
        folder: Path,
        most_rows: int | None = None,
    ) -> None:
        self.model, self.input_ids = model, input_ids
        self._outside = OutsideLayers(model)
        self.layers = self._outside.layers
        self._num_passed = 0
        sequences, length = input_ids.shape
        needs = WorkingSet.of(self._outside.layout, self._outside.nll, length)
        budget = _budget(memory_budget, model.device)
        _check_budget(needs, budget, length)
        first = self._outside.calls_of(input_ids[:1])[0]
        size = first.numel() * sequences * first.element_size()
        rest = budget - size if budget - size >= _least(needs) else budget
        limit = MAX_TOKENS.get(model.device.type, MAX_TOKENS["cpu"]) // length
        rows = max(1, min(needs.rows_within(rest), limit, sequences, most_rows or sequences))
        self.batches = [
            slice(start, min(start + rows, sequences)) for start in range(0, sequences, rows)
        ]
        self._states = HiddenStates(
            (sequences, length, first.shape[-1]),
            first.dtype,
            device=model.device,
            room=budget - rest,
            folder=folder,
        )
        # by batch size: masks and positions are the same for all batches of a size
        self._calls: dict[int, list[Call]] = {}
        for batch in self.batches:
            states, calls = self._outside.calls_of(input_ids[batch])
            self._states[batch] = states
            self._outside.check_alike(self._calls.setdefault(len(states), calls), calls)
        flipped = input_ids[self.batches[0]].flip(1)
        calls = self._outside.calls_of(flipped)[1]
        self._outside.check_alike(self._calls[len(flipped)], calls)

    def read(self, number: int) -> None:
        """Run the next layer and drop what it returns: for callers with hooks in it."""
        self._run(number, passes=False)

    def advance(self, number: int) -> None:
        """Pass the next layer; `number` must be its number."""
        self._run(number, passes=True)
        self._num_passed += 1

    def states(self, rows: slice | Tensor) -> Tensor:
        """Hidden states before the next layer.

        Args:
            rows: which sequences; int64 [b] on the CPU, or a slice.
        Returns:
            [b, T, D] on the model's device; may be the states themselves.
        """
        return self._states[rows]

    def apply(
        self, number: int, states: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """What the next layer makes of states, perhaps with other weights.

        Gradients flow into the weights where they are enabled.

        Args:
            number: of that layer.
            states: [b, T, D], as `states` gives them.
            weights: by their names in the layer; it has its own where one is missing.
        Returns:
            [b, T, D].
        """
        assert number == self._num_passed, f"expected layer {self._num_passed}, got {number}"
        if len(states) not in self._calls:
            self._calls[len(states)] = self._outside.calls_of(self.input_ids[: len(states)])[1]
        call = self._calls[len(states)][number]
        bring_in_layer(self.model, number)
        with evaluation_mode(self.model):
            output = functional_call(
                self.layers[number], dict(weights or {}), (states, *call.arguments), call.keywords
            )
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def output(self, number: int, batch: slice) -> Tensor:
        """What the next layer makes of a batch, [b, T, D]; the states stay as they are.

        Args:
            number: of that layer.
            batch: one of `batches`.
        """
        with torch.no_grad():
            return self.apply(number, self._states[batch])

    def advance_batch(self, number: int, batch: slice, output: Tensor) -> None:
        """Pass the next layer with a batch whose `output` is known; the last one passes it."""
        assert number == self._num_passed, f"expected layer {self._num_passed}, got {number}"
        self._states[batch] = output
        if batch == self.batches[-1]:
            self._num_passed += 1

    def losses(self, rows: slice = slice(None)) -> Tensor:
        """Next-token losses after the last layer, mean nats of every sequence: float32 [B].

        Args:
            rows: which sequences are wanted, if not all.
        """
        assert self._num_passed == len(self.layers), "some layers have not been passed"
        losses, size = [], len(range(*self.batches[0].indices(len(self.input_ids))))
        for part in torch.arange(len(self.input_ids))[rows].split(size):
            batch = slice(int(part[0]), int(part[-1]) + 1)
            input_ids = self.input_ids[batch].to(self.model.device)
            losses.append(self._outside.losses(self._states[batch], input_ids).cpu())
        return torch.cat(losses)

    def _run(self, number: int, *, passes: bool) -> None:
        for batch in self.batches:
            output = self.output(number, batch)
            if passes:
                self._states[batch] = output


def check_memory(
    model: PreTrainedModel, length: int, *, memory_budget: int | str | None = None
) -> None:
    """Raise ValueError if a `Sweep` over sequences of `length` tokens would not fit its budget."""
    outside = OutsideLayers(model)
    needs = WorkingSet.of(outside.layout, outside.nll, length)
    _check_budget(needs, _budget(memory_budget, model.device), length)


def _budget(memory_budget: int | str | None, device: torch.device) -> int:
    return default_budget(device) if memory_budget is None else parse_bytes(memory_budget)


def _least(needs: WorkingSet) -> int:
    """Bytes for one sequence."""
    return max(needs.mask + needs.layer, needs.logits + needs.hidden)


def _check_budget(needs: WorkingSet, budget: int, length: int) -> None:
    if budget < _least(needs):
        raise ValueError(
            f"memory budget: one sequence of {length} tokens needs about "
            f"{-(-_least(needs) // 2**20)} MiB besides the weights, "
            f"got a budget of {budget / 2**20:.0f} MiB"
        )


def sweep_losses(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    memory_budget: int | str | None = None,
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Next-token losses, mean nats of every sequence: int64 [B, T] -> float32 [B].

    Args:
        model, input_ids, memory_budget, folder: as in `Sweep`.
        advance: called with 1 after every layer, for a progress bar.
    """
    sweep = Sweep(model, input_ids, memory_budget=memory_budget, folder=folder)
    for number in range(len(sweep.layers)):
        sweep.advance(number)
        advance(1)
    return sweep.losses()
