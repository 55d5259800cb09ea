"""What of a model is trained, in float32, and how it becomes weights of the model again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.recovery.distill.zero_masks import ZeroMasks


class TrainedPart(Protocol):
    """Some parameters that are trained."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, in float32 (float64 if the model is)."""

    def mask_gradients(self) -> None:
        """Set gradients to zero where weights must stay zero."""

    def set_dropout(self, active: bool) -> None:
        """Switch the dropout of the training on or off."""

    def finish(self) -> None:
        """Put what was trained into the model, in its dtype, and leave no trace of the training."""


class WholeWeights:
    """Parameters of the model that are trained themselves.

    Args:
        parameters: by name; they get float32 values until `finish`.
        zeros: of a sparse model.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], zeros: ZeroMasks | None) -> None:
        self._parameters = parameters
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self._keep = {
            name: keep.to(parameters[name].device)
            for name, keep in (zeros.keep.items() if zeros else ())
            if name in parameters
        }
        for parameter in parameters.values():
            parameter.data = parameter.data.to(trained_dtype(parameter.dtype))
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """See `TrainedPart`."""
        return self._parameters

    def mask_gradients(self) -> None:
        """See `TrainedPart`."""
        for name, keep in self._keep.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.mul_(keep)

    def set_dropout(self, active: bool) -> None:
        """See `TrainedPart`; there is none."""

    def finish(self) -> None:
        """See `TrainedPart`."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            parameter.data = parameter.data.to(self._dtypes[name])


class TrainedParts:
    """All parts that are trained; everything else of the model is frozen meanwhile.

    Args:
        model: the model.
        parts: made from it.
        required: `requires_grad` of its parameters before, by identity.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Sequence[TrainedPart],
        required: Sequence[tuple[nn.Parameter, bool]],
    ) -> None:
        self._model, self._parts, self._required = model, list(parts), list(required)
        self.parameters = {
            name: parameter for part in parts for name, parameter in part.parameters.items()
        }

    def mask_gradients(self) -> None:
        """See `TrainedPart`."""
        for part in self._parts:
            part.mask_gradients()

    @contextmanager
    def with_dropout(self) -> Iterator[None]:
        """Inside, the dropout of the training is active; outside, nothing is random."""
        for part in self._parts:
            part.set_dropout(True)
        try:
            yield
        finally:
            for part in self._parts:
                part.set_dropout(False)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Give the parameters other values."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def finish(self) -> None:
        """See `TrainedPart`; the model's parameters are trainable or not as they were."""
        with torch.no_grad():
            for part in self._parts:
                part.finish()
        for parameter, was in self._required:
            parameter.requires_grad_(was)


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """In bfloat16, an update of 1e-4 of a weight is lost: what is trained has float32 at least."""
    return torch.promote_types(dtype, torch.float32)
