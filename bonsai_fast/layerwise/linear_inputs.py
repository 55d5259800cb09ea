"""Statistics of the inputs of linear layers: mean squares of every column, or their Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from bonsai_fast import ops

# a Gram matrix contains the mean squares
Needs = Literal["nothing", "moments", "gram"]


class UnusableInputsError(ValueError):
    """The inputs of a layer hold NaN or Inf, or the layer was never called."""


@dataclass(frozen=True, eq=False)
class LinearInputs:
    """Statistics of the inputs of one linear layer.

    Attributes:
        num_tokens: number of tokens.
        root_mean_square: float64 [in], over tokens.
        gram: float32 [in, in], mean of x x^T over tokens; None if not asked for.
    """

    num_tokens: int
    root_mean_square: Tensor
    gram: Tensor | None


class InputRecorder:
    """Inside `with`, records the inputs of linear layers.

    Layers that read the same tensor (queries, keys and values; gate and up) share one record; the
    first forward pass shows which do.

    Args:
        linears: the layers, by name.
        needs: what to record, not "nothing".
    """

    def __init__(self, linears: Mapping[str, nn.Linear], needs: Needs) -> None:
        self._linears = linears
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._add = _add_gram if needs == "gram" else _add_squares
        self._leader: dict[str, str] = {}
        self._first_pass: list[tuple[str, Tensor]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> InputRecorder:
        for name, linear in self._linears.items():

            def record(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                self._record(name, inputs[0])

            self._hooks.callback(linear.register_forward_pre_hook(record).remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()
        self._first_pass.clear()

    def of(self, name: str) -> LinearInputs:
        """The statistics of a layer.

        Raises:
            UnusableInputsError: NaN or Inf, or the layer was never called.
        """
        if name not in self._leader:
            raise UnusableInputsError(f"{name} is not used in the forward pass")
        leader = self._leader[name]
        mean = self._sums[leader] / self._tokens[leader]
        squares = mean.diagonal() if mean.dim() == 2 else mean
        if not bool(squares.isfinite().all()):
            raise UnusableInputsError(
                f"{name}: its inputs hold NaN or Inf; the model is broken or overflows in its dtype"
            )
        return LinearInputs(
            self._tokens[leader], squares.double().sqrt(), mean if mean.dim() == 2 else None
        )

    def _record(self, name: str, inputs: Tensor) -> None:
        leader = self._leader.get(name)
        if leader is None:
            found = (other for other, tensor in self._first_pass if tensor is inputs)
            leader = self._leader[name] = next(found, name)
            self._first_pass.append((name, inputs))
        elif self._first_pass:
            self._first_pass.clear()  # a second pass has begun
        if leader != name:
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        self._tokens[name] = self._tokens.get(name, 0) + len(rows)
        self._sums[name] = self._add(self._sums.get(name), rows)


def _add_squares(total: Tensor | None, rows: Tensor) -> Tensor:
    squares = ops.column_moments(rows.contiguous())[0]
    return squares if total is None else total.add_(squares)


def _add_gram(total: Tensor | None, rows: Tensor) -> Tensor:
    wide = rows.float()
    if total is None:
        total = torch.zeros(wide.shape[1], wide.shape[1], device=wide.device)
    return total.addmm_(wide.T, wide)
