"""What a method is given, and the work that it plans."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from bonsai_fast.config import PruneConfig
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods.allocation import Target
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer


@dataclass(frozen=True)
class Task:
    """What is to be pruned, on which text, how far and how; everything in it has been checked.

    Attributes:
        model, scorer: the parent and its scorer.
        calibration: its text.
        config: resolved configuration.
        target: what is asked for.
    """

    model: PreTrainedModel
    scorer: MaskScorer
    calibration: Sequences
    config: PruneConfig
    target: Target

    @property
    def layout(self) -> Layout:
        return self.scorer.layout


@dataclass(frozen=True)
class Plan:
    """Work that a method is going to do: rounds, sub-models scored, forward tokens."""

    rounds: int
    submodels: int
    tokens: int
