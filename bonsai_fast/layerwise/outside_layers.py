"""A model without its decoder layers: how it embeds text, calls its layers, and computes losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import bring_in_layer, stream_of
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.scoring.sequence_nll import evaluation_mode

# tokens that tell whether layers return tuples
PROBE_TOKENS = 2
# (number of the layer, its own forward, arguments, keywords) -> what the layer returns
Act = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Call:
    """How the model calls a layer, besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.arguments, self.keywords))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class OutsideLayers:
    """Runs a model's own code with something else in the place of its decoder layers.

    Args:
        model: a causal language model, in memory or streamed. Of a streamed one, the first layer is
            read once, to see what layers return.
    Attributes:
        layout: of the model.
        layers: its decoder layers.
        nll: its loss, from last hidden states.
    Raises:
        UnsupportedModelError: no known decoder.
        ValueError: the model's logits are not its LM head on its last hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layout = Layout.of(model)
        self.layers = list(model.get_submodule(self.layout.decoder.path).children())
        self._returns_tuple = self._probe()
        # it runs the model to check it; the layers do not matter to that
        with self._acting(lambda _, __, *call: self._as_returned(_states_in(*call))):
            self.nll = SequenceNLL(model)

    def calls_of(self, input_ids: Tensor) -> tuple[Tensor, list[Call]]:
        """What the first layer reads, [b, T, D], and how every layer is called.

        Args:
            input_ids: int64 [b, T] on any device.
        Raises:
            ValueError: a layer is called more or less than once.
        """
        first: list[Tensor] = []
        calls: list[Call] = []

        def act(_: int, __: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            others = {name: x for name, x in keywords.items() if name != "hidden_states"}
            calls.append(Call(arguments[1:], others))
            first.append(_states_in(arguments, keywords))
            return self._as_returned(first[-1])

        self._run(input_ids, act)
        if len(calls) != len(self.layers):
            raise ValueError(
                f"{type(self.model).__name__}: expected each of its {len(self.layers)} layers to "
                f"be called once, got {len(calls)} calls"
            )
        return first[0], calls

    def check_alike(self, calls: list[Call], others: list[Call]) -> None:
        """Raise ValueError if layers are called differently for different texts."""
        for number, (call, other) in enumerate(zip(calls, others, strict=True)):
            pairs = zip(call.tensors, other.tensors, strict=True)
            if not all(one is two or torch.equal(one, two) for one, two in pairs):
                raise ValueError(
                    f"{type(self.model).__name__}: layer {number} needs inputs besides "
                    "hidden_states; layer-by-layer pruning does not support this model"
                )

    def losses(self, states: Tensor, input_ids: Tensor) -> Tensor:
        """Next-token losses, mean nats of every sequence: float32 [b].

        Args:
            states: [b, T, D] after the last layer.
            input_ids: int64 [b, T] on the same device.
        """
        last = self._run(input_ids, lambda *_: self._as_returned(states))
        return self.nll.losses_of(last, input_ids)

    def _probe(self) -> bool:
        """Whether layers return tuples; runs the first one on a few tokens."""
        returned: list[Any] = []

        def act(_: int, forward: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
            if not returned:
                bring_in_layer(self.model, 0)
                returned.append(forward(*arguments, **keywords))
            return returned[0]

        self._run(torch.arange(PROBE_TOKENS)[None], act)
        return isinstance(returned[0], tuple)

    def _run(self, input_ids: Tensor, act: Act) -> Tensor:
        """Last hidden states of the model's code around the layers."""
        with self._acting(act), torch.no_grad(), evaluation_mode(self.model):
            ids = input_ids.to(self.model.device)
            states: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _as_returned(self, states: Tensor) -> Any:
        return (states, None) if self._returns_tuple else states

    @contextmanager
    def _acting(self, act: Act) -> Iterator[None]:
        """Inside, a function acts in the place of every layer; none is streamed."""
        stream = stream_of(self.model)
        with nullcontext() if stream is None else stream.paused():
            try:
                for number, layer in enumerate(self.layers):
                    forward = layer.forward

                    def instead(
                        *arguments: Any, number: int = number, forward: Any = forward, **words: Any
                    ) -> Any:
                        return act(number, forward, arguments, words)

                    vars(layer)["forward"] = instead
                yield
            finally:
                for layer in self.layers:
                    vars(layer).pop("forward", None)


def _states_in(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer."""
    states: Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return states
