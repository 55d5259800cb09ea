"""What methods that zero single weights have in common.

They are a kind of their own beside those of `search`: nothing changes its shape, every layer is
pruned as soon as those before it are, and a method sees one matrix and its inputs at a time.
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
from bonsai_fast.methods.weights import LinearInputs, Needs
from bonsai_fast.methods.weights.brain_surgeon import BLOCK, InverseHessian, prune_columns
from bonsai_fast.methods.weights.keep_best import keep_best
from bonsai_fast.methods.weights.weight_options import WeightOptions


@dataclass(frozen=True)
class Choice:
    """What is left to the user.

    Attributes:
        pattern: which zeros are allowed.
        within: which weights compete; of no effect under an N:M pattern.
        weight_update: whether the weights that stay make up for those that go.
    """

    pattern: Pattern
    within: CompareWithin
    weight_update: bool

    @classmethod
    def of(cls, config: ResolvedConfig[WeightOptions]) -> Choice:
        """What a configuration says."""
        options = config.options
        pattern = Pattern.parse(options.pattern, config.sparsity)
        return cls(pattern, options.compare_within, options.weight_update)


class WeightMethod(Protocol):
    """A method that zeroes weights of one matrix at a time."""

    @property
    def presets(self) -> Mapping[PresetName, Preset[WeightOptions]]:
        """Values for what the user leaves out."""

    def needs(self, choice: Choice) -> Needs:
        """What it must know of a matrix's inputs."""

    def prune(self, weight: Tensor, inputs: LinearInputs | None, choice: Choice) -> Tensor:
        """The pruned matrix.

        Args:
            weight: float16, bfloat16 or float32 [out, in]; unchanged.
            inputs: what `needs` asked for, on the same device; None if that was nothing.
            choice: of the user.
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
        hessian: of the matrix's inputs, by which the other weights make up for the zeros; None
            leaves them as they are.
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
