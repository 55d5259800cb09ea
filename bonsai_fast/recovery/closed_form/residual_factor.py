"""Whether a sub-layer's output is added to the residual stream, and with which factor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

# of the change that the probe makes; what rounding in 16 bits may do to it
TOLERANCE = 0.05


def residual_factor(
    run: Callable[[], Tensor], output: nn.Module, other: nn.Module | None
) -> float | None:
    """The factor f of x = x + f output(...), found by changing what the projection gives.

    1 in most families; Granite has its own. None where the output is normalised before it is added,
    as in Gemma 2.

    Args:
        run: runs the layer on a few tokens and returns [b, T, D].
        output: the output projection in question.
        other: that of the layer's other sub-layer; what it gives is held fixed.
    """
    held: list[Tensor] = []
    with ExitStack() as hooks:
        if other is not None:

            def hold(_: nn.Module, __: Any, found: Tensor) -> Tensor:
                held[:1] = held[:1] or [found]
                return held[0]

            hooks.callback(other.register_forward_hook(hold).remove)
        before = run().double()
        generator = torch.Generator().manual_seed(0)
        size = before.square().mean(dim=-1, keepdim=True).sqrt()
        change = torch.randn(before.shape, generator=generator).to(before) * size

        def shift(_: nn.Module, __: Any, found: Tensor) -> Tensor:
            return (found.double() + change.view(found.shape)).to(found.dtype)

        hooks.callback(output.register_forward_hook(shift).remove)
        after = run().double()
    difference = after - before
    factor = float((difference * change).sum() / change.square().sum())
    left = float((difference - factor * change).square().sum() / change.square().sum())
    return factor if left**0.5 <= TOLERANCE * abs(factor) else None
