"""The protocol of pruning methods that remove units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from transformers import PreTrainedModel

from bonsai_fast.config.choices import PresetName
from bonsai_fast.config.presets import Preset
from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.unit_options import UnitOptions

OptionsT = TypeVar("OptionsT", bound=UnitOptions)


@runtime_checkable
class Compensates(Protocol):
    """A method that adjusts the smaller model to make up for the removed units."""

    def compensate(self, search: Search[Any], smaller: PreTrainedModel, keep: torch.Tensor) -> None:
        """Change the smaller model, made with the keep mask bool [P], in place."""


class Method(Protocol[OptionsT]):
    """A pruning method."""

    @property
    def presets(self) -> Mapping[PresetName, Preset[OptionsT]]:
        """Values for what the user leaves out."""

    def plan(self, task: Task[OptionsT]) -> Plan:
        """Work that `find` will do."""

    def find(self, search: Search[OptionsT]) -> torch.Tensor:
        """The units to keep, bool [P]; within the budget, with the requested shapes."""
