"""Refuses weights that are not numbers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import named_weights


def check_finite(model: PreTrainedModel, what: str) -> None:
    """Raise ValueError if a weight is NaN or Inf; `what` says which model it is."""
    for name, parameter in named_weights(model):
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{what}'s weights hold NaN or Inf, first in {name}")
