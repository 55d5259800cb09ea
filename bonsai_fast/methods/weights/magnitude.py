"""Method "magnitude": zeroes small weights. It reads no text.

Source: the baseline of Sun et al., arXiv:2306.11695, which compares within a layer (appendix A.1).
"""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.layerwise import LinearInputs, Needs
from bonsai_fast.methods.weights.weight_method import Choice, hessian_of, without_worst
from bonsai_fast.methods.weights.weight_options import weight_presets
from bonsai_fast.ops import native


class Magnitude:
    """Scores |W_ij|."""

    presets = weight_presets("layer", weight_update=False)

    def needs(self, choice: Choice) -> Needs:
        """Nothing; the Gram matrix if the other weights are adjusted."""
        return "gram" if choice.weight_update else "nothing"

    def prune(self, weight: Tensor, inputs: LinearInputs | None, choice: Choice) -> Tensor:
        """See `WeightMethod`."""
        scores = native.wanda_scores(weight, weight.new_ones(weight.shape[1]))
        hessian = hessian_of(inputs) if choice.weight_update else None
        return without_worst(weight, scores, hessian, choice)
