"""Method "sparsegpt": zeroes the weights that cost the least once the others are adjusted.

Columns are processed from left to right. The zeros are chosen for 128 columns (or one N:M group) at
a time, from the weights as adjusted for the columns before.

Source: Frantar and Alistarh, arXiv:2301.00774, as Sun et al., arXiv:2306.11695, describe it in
table 1, section 3.2 and appendix D; see `brain_surgeon`. Without the weight update, this is the
second row of their tables 3 and 7: w^2 / [H^-1]_jj, compared as `compare_within` says.
"""

from __future__ import annotations

from torch import Tensor

from bonsai_fast.layerwise import LinearInputs, Needs
from bonsai_fast.methods.weights.brain_surgeon import BLOCK, prune_columns
from bonsai_fast.methods.weights.keep_best import keep_best
from bonsai_fast.methods.weights.weight_method import Choice, hessian_of, without_worst
from bonsai_fast.methods.weights.weight_options import weight_presets


class SparseGPT:
    """Scores w_ij^2 / [H^-1]_jj."""

    presets = weight_presets("input-128", weight_update=True)

    def needs(self, choice: Choice) -> Needs:
        """The Gram matrix."""
        return "gram"

    def prune(self, weight: Tensor, inputs: LinearInputs | None, choice: Choice) -> Tensor:
        """See `WeightMethod`."""
        hessian, pattern = hessian_of(inputs), choice.pattern
        as_it_goes = pattern.group is not None or choice.within == "input-128"
        if not (choice.weight_update and as_it_goes):
            made_up = hessian if choice.weight_update else None
            return without_worst(weight, hessian.costs(weight), made_up, choice)

        def choose(_: int, __: Tensor, costs: Tensor) -> Tensor:
            return keep_best(costs, pattern, "layer")

        pruned = prune_columns(weight, hessian, choose, step=pattern.group or BLOCK)
        return pruned.to(weight.dtype)
