"""The experts of a mixture, run one after another, so that what each computes can be seen."""

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


Watch = Callable[[Sequence[ExpertCall], int], None]
# [n, I] inputs of an expert's output projection and int64 [n], their tokens -> the same, changed
Change = Callable[[Tensor, Tensor, int], Tensor]


@contextmanager
def experts_watched(experts: nn.Module, watch: Watch) -> Iterator[None]:
    """Inside, what each expert of a mixture does is shown.

    Args:
        experts: the module that holds their weights, as transformers 5 does.
        watch: called for every batch with the experts that tokens chose, and the number of tokens.
    """
    with _one_by_one(experts) as run:
        run.watches.append(watch)
        try:
            yield
        finally:
            run.watches.remove(watch)


@contextmanager
def channels_masked(experts: nn.Module, removed: Tensor) -> Iterator[None]:
    """Inside, channels of all experts of a mixture are zero, other ones in each row of a batch.

    Args:
        experts: the module that holds their weights.
        removed: bool [R, I] on its device; the tokens are R rows of equally many.
    """

    def change(inner: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
        rows = tokens // (num_tokens // len(removed))
        # selected, not multiplied: NaN or Inf in a removed channel would survive as NaN * 0
        return inner.masked_fill(removed[rows], 0)

    with _one_by_one(experts) as run:
        run.changes.append(change)
        try:
            yield
        finally:
            run.changes.remove(change)


@contextmanager
def _one_by_one(experts: nn.Module) -> Iterator[_OneByOne]:
    own = vars(experts).get("forward")
    if isinstance(own, _OneByOne):
        yield own
        return
    run = _OneByOne(experts)
    experts.forward = run
    try:
        yield run
    finally:
        del experts.forward
        if own is not None:
            experts.forward = own


class _OneByOne:
    """Stands in for the forward method of a mixture's experts."""

    def __init__(self, experts: nn.Module) -> None:
        self._experts: Any = experts
        self.changes: list[Change] = []
        self.watches: list[Watch] = []

    def __call__(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See `use_experts_implementation` of transformers: [N, D], [N, k], [N, k] -> [N, D]."""
        experts, found = self._experts, torch.zeros_like(states)
        calls: list[ExpertCall] = []
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            inner = self._inner(states[token], expert)
            for change in self.changes:
                inner = change(inner, token, len(states))
            output = self._product("down_proj", inner, expert)
            if getattr(experts, "has_post_expert_norm", False):
                output = experts.post_expert_norm(output)
            share = weights[token, place]
            found.index_add_(0, token, (output * share[:, None]).to(found.dtype))
            # with too few experts left, a token also meets removed ones, at weight zero
            met = share != 0
            if self.watches and bool(met.any()):
                calls.append(ExpertCall(expert, inner[met], output[met], share[met]))
        for watch in self.watches:
            watch(calls, len(states))
        return found

    def _inner(self, states: Tensor, expert: int) -> Tensor:
        """[n, D] -> [n, I]."""
        if self._experts.has_gate:
            both = self._product("gate_up_proj", states, expert)
            gated: Tensor = self._experts._apply_gate(both)
            return gated
        plain: Tensor = self._experts.act_fn(self._product("up_proj", states, expert))
        return plain

    def _product(self, name: str, states: Tensor, expert: int) -> Tensor:
        """States times one expert's part of a weight."""
        weight: Tensor = getattr(self._experts, name)[expert]
        found = states @ (weight if self._experts.is_transposed else weight.T)
        if self._experts.has_bias:
            found = found + getattr(self._experts, f"{name}_bias")[expert]
        return found
