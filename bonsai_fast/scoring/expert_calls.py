"""What every expert of a mixture reads and gives, seen one expert at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ExpertCall:
    """One expert at work on the tokens that chose it.

    Attributes:
        expert: its number.
        inner: [n, I], the input of its output projection.
        output: [n, D], what it gives before the router's weight.
        weights: [n], the router's weights.
    """

    expert: int
    inner: Tensor
    output: Tensor
    weights: Tensor


@contextmanager
def experts_watched(
    experts: nn.Module, watch: Callable[[Sequence[ExpertCall], int], None]
) -> Iterator[None]:
    """Inside, the experts of a mixture run one after another, and what each does is shown.

    Args:
        experts: the module that holds their weights, as transformers 5 does.
        watch: called for every batch with the experts that tokens chose, and the number of tokens.
    """

    def forward(states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        found, calls = torch.zeros_like(states), []
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            inner = _inner(experts, states[token], expert)
            output = _product(experts, "down_proj", inner, expert)
            if getattr(experts, "has_post_expert_norm", False):
                output = experts.get_submodule("post_expert_norm")(output)
            share = weights[token, place]
            # with too few experts left, a token also meets removed ones, at weight zero
            met = share != 0
            if bool(met.any()):
                calls.append(ExpertCall(expert, inner[met], output[met], share[met]))
            found.index_add_(0, token, (output * share[:, None]).to(found.dtype))
        watch(calls, len(states))
        return found

    own = vars(experts).get("forward")
    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward
        if own is not None:
            experts.forward = own


def _inner(experts: Any, states: Tensor, expert: int) -> Tensor:
    """[n, D] -> [n, I]."""
    if experts.has_gate:
        gated: Tensor = experts._apply_gate(_product(experts, "gate_up_proj", states, expert))
        return gated
    plain: Tensor = experts.act_fn(_product(experts, "up_proj", states, expert))
    return plain


def _product(experts: Any, name: str, states: Tensor, expert: int) -> Tensor:
    """States times one expert's part of a weight."""
    weight: Tensor = getattr(experts, name)[expert]
    found = states @ (weight if experts.is_transposed else weight.T)
    return found + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else found
