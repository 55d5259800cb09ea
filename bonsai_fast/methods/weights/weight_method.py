"""What methods that zero single weights have in common.

Unlike methods that remove units, they change no shape. Layers are pruned one at a time, each on the
outputs of the layers pruned before it; a method sees one matrix and its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bonsai_fast.config import ResolvedConfig
from bonsai_fast.config.choices import CompareWithin, PresetName
from bonsai_fast.config.presets import Preset
from bonsai_fast.config.weight_pattern import Pattern
from bonsai_fast.layerwise import LinearInputs, Needs
from bonsai_fast.methods.weights.brain_surgeon import BLOCK, InverseHessian, prune_columns
from bonsai_fast.methods.weights.keep_best import keep_best
from bonsai_fast.methods.weights.weight_options import WeightOptions


@dataclass(frozen=True)
class Choice:
    """The options of a method, parsed.

    Attributes:
        pattern: which zeros are allowed.
        within: which weights compete; not used with an N:M pattern.
        weight_update: whether the other weights are adjusted to make up for the zeros.
    """

    pattern: Pattern
    within: CompareWithin
    weight_update: bool

    @classmethod
    def of(cls, config: ResolvedConfig[WeightOptions]) -> Choice:
        """The choice of a configuration."""
        options = config.options
        pattern = Pattern.parse(options.pattern, config.sparsity)
        return cls(pattern, options.compare_within, options.weight_update)


class WeightMethod(Protocol):
    """A method that zeroes weights of one matrix at a time."""

    @property
    def presets(self) -> Mapping[PresetName, Preset[WeightOptions]]:
        """Values for what the user leaves out."""

    def needs(self, choice: Choice) -> Needs:
        """Statistics of a matrix's inputs that `prune` needs."""

    def prune(self, weight: Tensor, inputs: LinearInputs | None, choice: Choice) -> Tensor:
        """The pruned matrix.

        Args:
            weight: float16, bfloat16 or float32 [out, in]; unchanged.
            inputs: the statistics of `needs`, on the same device; None if "nothing".
            choice: the options.
        Returns:
            [out, in] in its dtype, with exact zeros.
        """


def without_worst(
    weight: Tensor, scores: Tensor, hessian: InverseHessian | None, choice: Choice
) -> Tensor:
    """Zero the weights with the lowest scores.

    Args:
        weight, choice: as in `WeightMethod.prune`.
        scores: float32 [out, in], not negative.
        hessian: of the matrix's inputs, to adjust the other weights; None leaves them unchanged.
    """
    keep = keep_best(scores, choice.pattern, choice.within)
    if hessian is None:
        return weight.masked_fill(~keep, 0.0)

    def choose(first: int, now: Tensor, _: Tensor) -> Tensor:
        return keep[:, first : first + now.shape[1]]

    return prune_columns(weight, hessian, choose, step=BLOCK).to(weight.dtype)


def hessian_of(inputs: LinearInputs | None) -> InverseHessian:
    """Of a matrix whose Gram matrix was asked for."""
    assert inputs is not None and inputs.gram is not None
    return InverseHessian(inputs.gram)
