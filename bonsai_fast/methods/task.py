"""What a method is given, and the work that it plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from transformers import PreTrainedModel

from bonsai_fast.config import ResolvedConfig
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods.allocation import Target
from bonsai_fast.methods.units.unit_options import UnitOptions
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer

O_co = TypeVar("O_co", bound=UnitOptions, covariant=True)


@dataclass(frozen=True)
class Task(Generic[O_co]):
    """What is to be pruned, on which text, how far and how; everything in it has been checked.

    Attributes:
        model, scorer: the parent and its scorer.
        calibration: its text.
        config: what was asked for, with the preset filled in.
        target: what is asked for.
    """

    model: PreTrainedModel
    scorer: MaskScorer
    calibration: Sequences
    config: ResolvedConfig[O_co]
    target: Target

    @property
    def options(self) -> O_co:
        """The options of the method."""
        return self.config.options

    @property
    def layout(self) -> Layout:
        return self.scorer.layout


@dataclass(frozen=True)
class Plan:
    """Work that a method is going to do: rounds, sub-models scored, forward tokens."""

    rounds: int
    submodels: int
    tokens: int
