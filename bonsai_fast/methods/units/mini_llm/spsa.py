"""Gradients from two losses: all weights are perturbed along a random direction, and against it.

    g = (L(x + e z) - L(x - e z)) / (2 e) z,   E[z z'] = I,   so that E[g] -> grad L as e -> 0

Directions are not stored but drawn again from their seeds. Each decoder layer's weights are
perturbed only while that layer runs, and restored from a copy: this needs the memory of inference
and one layer, and the weights afterwards are the same bits.

Source: Spall, 1992; its use for pruning follows MINI-LLM, definition 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models.layout import Layout

Hook = Callable[..., tuple[torch.Tensor, ...] | None]


class Directions:
    """Standard normal directions, each a function of its number alone.

    Args:
        names: the tensors that are perturbed, in a fixed order.
        seed: of all directions.
    """

    def __init__(self, names: list[str], seed: int) -> None:
        self._place = {name: place for place, name in enumerate(names)}
        self._seed = seed

    def draw(
        self, number: int, name: str, shape: torch.Size | tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        """The part of direction `number` for one tensor: float32, the same at every call."""
        key = (self._seed, number, self._place[name])
        state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
        return torch.randn(shape, generator=generator, device=device)


def prunable_weights(layout: Layout) -> list[str]:
    """Names of the parameters that units own parts of, each once, in a fixed order."""
    names = [found.parameter for block in layout.decoder.blocks() for found in block.cuts]
    return list(dict.fromkeys(names))


@contextmanager
def perturbed_weights(
    model: PreTrainedModel, layout: Layout, directions: Directions, number: int, scale: float
) -> Iterator[None]:
    """Inside, the model computes with w + scale * z instead of every prunable weight w.

    A layer's weights are changed only while it runs.
    """
    names: dict[str, list[str]] = {}
    for name in prunable_weights(layout):
        layer = next(
            path
            for index in range(layout.decoder.num_layers)
            if name.startswith(f"{(path := f'{layout.decoder.path}.{index}')}.")
        )
        names.setdefault(layer, []).append(name)
    copies: dict[str, torch.Tensor] = {}

    def restore(*_: object) -> None:
        for name, copy in copies.items():
            model.get_parameter(name).data.copy_(copy)
        copies.clear()

    def perturb(layer: str) -> Hook:
        def hook(*_: object) -> None:
            for name in names[layer]:
                weight = model.get_parameter(name).data
                copies[name] = weight.clone()
                noise = directions.draw(number, name, weight.shape, weight.device)
                weight.copy_(noise.mul_(scale).add_(weight))

        return hook

    with ExitStack() as stack:
        stack.callback(restore)
        for layer in names:
            module = model.get_submodule(layer)
            stack.callback(module.register_forward_pre_hook(perturb(layer)).remove)
            stack.callback(module.register_forward_hook(restore, always_call=True).remove)
        yield


@contextmanager
def scaled_gates(model: PreTrainedModel, layout: Layout, gates: torch.Tensor) -> Iterator[None]:
    """Inside, every unit's contribution is multiplied by its gate.

    Args:
        gates: float32 [P]; 1 leaves a unit unchanged.
    """
    factors: dict[str, torch.Tensor] = {}
    for group in layout.groups:
        own = gates[group.start : group.stop][group.part_of_unit]
        factors[group.block.output] = own * factors.get(group.block.output, torch.ones(()))

    def scale(factor: torch.Tensor) -> Hook:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            states = inputs[0]
            columns = factor.repeat_interleave(states.shape[-1] // len(factor))
            # in float32: a gate is close to one
            scaled = states * columns.to(states.device)
            return (scaled.to(states.dtype), *inputs[1:])

        return hook

    with ExitStack() as stack:
        for output, factor in factors.items():
            module = model.get_submodule(output)
            stack.callback(module.register_forward_pre_hook(scale(factor)).remove)
        yield
