"""What projections inside a decoder layer read and give while the layer runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Calls:
    """What modules read and gave in one forward pass, by their names.

    Attributes:
        inputs: [b, T, in], or [b * T, in] as OPT flattens it.
        outputs: [b, T, out].
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """Inside, records what modules read and give; the last call of each counts."""
    calls = Calls()
    with ExitStack() as hooks:
        for name, module in modules.items():

            def after(_: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                calls.inputs[name], calls.outputs[name] = inputs[0], output

            hooks.callback(module.register_forward_hook(after).remove)
        yield calls


@contextmanager
def silenced(module: nn.Module | None) -> Iterator[None]:
    """Inside, a module gives zeros; None: nothing is changed."""
    if module is None:
        yield
        return
    hook = module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        yield
    finally:
        hook.remove()


def as_rows(states: Tensor) -> Tensor:
    """[..., width] -> [N, width]."""
    return states.reshape(-1, states.shape[-1])


def token_weights(residual: Tensor) -> Tensor:
    """1 / mean square of each token's residual stream, [..., D] -> float32 [N].

    The first token's residual is often 100 times as large as the others'. Without these weights it
    alone would decide.
    """
    squares = as_rows(residual).float().square().mean(dim=1)
    return squares.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
