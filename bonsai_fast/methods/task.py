"""What a method is given, and the work that it plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.config import ResolvedConfig
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods.units.unit_options import UnitOptions
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer

if TYPE_CHECKING:  # a method takes a task
    from bonsai_fast.methods.method import Method

O_co = TypeVar("O_co", bound=UnitOptions, covariant=True)


@dataclass(frozen=True)
class Task(Generic[O_co]):
    """Which units to remove, by which method and on which text; all of it has been checked.

    Attributes:
        model, tokenizer, scorer: the parent and its scorer.
        calibration: text that the method reads.
        evaluation: text for perplexity.
        config: the request, with the preset filled in.
        method: the method named there.
        budget: number of the decoder's parameters to remove.
        compensates: whether output projections are refitted after the cut.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scorer: MaskScorer
    calibration: Sequences
    evaluation: Sequences
    config: ResolvedConfig[O_co]
    method: Method[Any]
    budget: int
    compensates: bool = False

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
