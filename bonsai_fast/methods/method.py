"""The protocol of pruning methods that remove units."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task


@runtime_checkable
class Compensates(Protocol):
    """A method that makes up for what is gone, in the model that is left."""

    def compensate(self, search: Search, smaller: PreTrainedModel, keep: torch.Tensor) -> None:
        """Change the smaller model, made with the keep mask bool [P], in place."""


class Method(Protocol):
    """A pruning method."""

    def plan(self, task: Task) -> Plan:
        """Work that `find` is going to do."""

    def find(self, search: Search) -> torch.Tensor:
        """Which units stay, bool [P]; target, head layout and width rounding are met."""
