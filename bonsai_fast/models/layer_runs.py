"""One run of a stand-in of a decoder: which modules are its layers, and how each is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bonsai_fast.models.stand_in import StandIn

TOKENS = 8
# What the forward pass of a model that is not made for one text of a few tokens may raise.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class LayerRun:
    """A decoder layer, and how the model calls it.

    Attributes:
        path: of the layer, inside the decoder.
        states: its input, [1, T, D], a leaf.
        output: its new hidden states, [1, T, D].
    """

    path: str
    layer: nn.Module
    states: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor | None = None
    num_calls: int = 0

    def again(self) -> Tensor:
        """Run the layer once more on the same input."""
        return hidden_states_of(self.layer(*self.arguments, **self.keywords))


@dataclass
class DecoderRun:
    """The layers that a decoder ran, by the path of their ModuleList inside the decoder."""

    stand_in: StandIn
    lists: dict[str, dict[int, LayerRun]] = field(default_factory=dict)


def hidden_states_of(result: Any) -> Tensor:
    """The new hidden states among what a layer returns.

    Raises:
        TypeError: there are none.
    """
    states = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(states, Tensor):
        raise TypeError(f"expected a layer that returns hidden states, got {type(states).__name__}")
    return states


@contextmanager
def traced() -> Iterator[None]:
    """Gradients are recorded, whatever the caller's mode; its random numbers are not touched."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def run_decoder(stand_in: StandIn) -> DecoderRun:
    """Run a stand-in on a few tokens. Every layer gets random hidden states of its own.

    Raises:
        one of FAILURES: it cannot be run on input_ids alone.
    """
    found = DecoderRun(stand_in)
    with ExitStack() as hooks:
        for path, module in _outermost_lists(stand_in.decoder):
            for index, layer in enumerate(module):
                before = _before(found, path, index)
                hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(_after(found, path, index)).remove)
        ids = torch.arange(TOKENS).unsqueeze(0)
        stand_in.decoder(input_ids=ids, use_cache=False)
    for runs in found.lists.values():
        for index, run in list(runs.items()):
            if run.output is None:
                del runs[index]
    return found


def _outermost_lists(decoder: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in decoder.named_modules():
        inside = any(path.startswith(f"{other}.") for other, _ in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found.append((path, module))
    return found


def _is_states(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() == 3
        and value.shape[:2] == (1, TOKENS)
    )


def _before(found: DecoderRun, path: str, index: int) -> Callable[..., Any]:
    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runs = found.lists.setdefault(path, {})
        if index in runs:
            runs[index].num_calls += 1
            return None
        places: list[Any] = [
            place for place, value in [*enumerate(args), *kwargs.items()] if _is_states(value)
        ]
        if not places:
            return None
        place = places[0]
        given = args[place] if isinstance(place, int) else kwargs[place]
        states = torch.randn(
            given.shape, generator=found.stand_in.switches.generator
        ).requires_grad_()
        arguments, keywords = list(args), dict(kwargs)
        if isinstance(place, int):
            arguments[place] = states
        else:
            keywords[place] = states
        runs[index] = LayerRun(
            f"{path}.{index}", layer, states, tuple(arguments), keywords, num_calls=1
        )
        return tuple(arguments), keywords

    return before


def _after(found: DecoderRun, path: str, index: int) -> Callable[..., None]:
    def after(layer: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        run = found.lists.get(path, {}).get(index)
        states = result[0] if isinstance(result, (tuple, list)) and len(result) else result
        if (
            run is not None
            and run.output is None
            and isinstance(states, Tensor)
            and states.shape == run.states.shape
        ):
            run.output = states

    return after
