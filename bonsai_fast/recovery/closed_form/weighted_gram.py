"""Weighted second moments of what a linear layer reads, summed over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.recovery.closed_form.symmetric_product import add_symmetric_product, mirror

# tokens whose products are summed in float32 before they are added to the totals
BLOCK_TOKENS = 4096


class WeightedGram:
    """Sums of w, w x and w x x^T.

    Args:
        num_inputs: of the layer.
        device: where the sums are kept.
        with_means: whether w x is summed, too; otherwise it stays 0.
    Attributes:
        num_tokens: added so far.
        weight: float64 [], sum of w.
        inputs: float64 [in], sum of w x.
    """

    def __init__(self, num_inputs: int, device: torch.device, *, with_means: bool) -> None:
        self.num_tokens = 0
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.inputs = torch.zeros(num_inputs, dtype=torch.float64, device=device)
        self._with_means = with_means
        self._gram = torch.zeros(num_inputs, num_inputs, device=device)

    def add(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Add a block of tokens, best `BLOCK_TOKENS` of them.

        Args:
            inputs: [N, in].
            weights: float32 [N], not negative.
        Returns:
            float32 [N, in], w x.
        """
        wide = inputs.float()
        weighted = wide * weights[:, None]
        add_symmetric_product(self._gram, weighted, wide)
        self.weight += weights.sum(dtype=torch.float64)
        if self._with_means:
            self.inputs += weighted.sum(dim=0, dtype=torch.float64)
        self.num_tokens += len(wide)
        return weighted

    @property
    def is_finite(self) -> bool:
        """Whether no token held NaN or Inf."""
        return bool(self._gram.diagonal().isfinite().all())

    def gram(self) -> Tensor:
        """Sum of w x x^T, float32 [in, in]; the sum itself."""
        return mirror(self._gram)
