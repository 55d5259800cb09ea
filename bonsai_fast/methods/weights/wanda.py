"""Method "wanda": zeroes weights whose product with the norm of their input is small.

Weights are compared inside their row. Each layer is pruned on the outputs of the layers pruned
before it. The other weights do not change.

Source: Sun et al., arXiv:2306.11695, equations 1 and 2 and algorithm 1; N:M: appendix C.
Differs: uses the root mean square of an input for its norm, which changes no comparison.
"""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.layerwise import LinearInputs, Needs
from bonsai_fast.methods.weights.weight_method import Choice, hessian_of, without_worst
from bonsai_fast.methods.weights.weight_options import weight_presets
from bonsai_fast.ops import native


class Wanda:
    """Scores |W_ij| ||X_j||_2."""

    presets = weight_presets("output", weight_update=False)

    def needs(self, choice: Choice) -> Needs:
        """Moments; the Gram matrix if the other weights are adjusted."""
        return "gram" if choice.weight_update else "moments"

    def prune(self, weight: Tensor, inputs: LinearInputs | None, choice: Choice) -> Tensor:
        """See `WeightMethod`."""
        assert inputs is not None
        scores = native.wanda_scores(weight, inputs.root_mean_square)
        hessian = hessian_of(inputs) if choice.weight_update else None
        return without_worst(weight, scores, hessian, choice)
