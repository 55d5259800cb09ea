"""The size of the pruned model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from bonsai_fast.models.layout import Layout

_ACCEPTED = (
    "expected sparsity=FRACTION in (0, 1), such as sparsity=0.2, or params=COUNT, such as "
    "params=110M or params=5B"
)
_MULTIPLIERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Target:
    """The size of the pruned model; exactly one of the two is given.

    Attributes:
        sparsity: fraction of the decoder's parameters to remove, in (0, 1); embeddings and LM head
            are left out.
        params: parameters of the whole pruned model, embeddings and LM head included.
    Raises:
        ValueError: none or both are given, or one is out of range.
    """

    sparsity: float | None = None
    params: int | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.params is None):
            raise ValueError(
                f"target: {_ACCEPTED}; got sparsity={self.sparsity} and params={self.params}"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"target: {_ACCEPTED}; got sparsity={self.sparsity}")
        if self.params is not None and self.params < 1:
            raise ValueError(f"target: {_ACCEPTED}; got params={self.params}")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read "sparsity=0.2", "params=110M", "params=5B" or "params=110_000_000".

        Raises:
            ValueError: the text is anything else.
        """
        name, _, value = text.replace(" ", "").partition("=")
        try:
            if name == "sparsity":
                return cls(sparsity=float(value))
            if name == "params" and (
                found := re.fullmatch(r"([0-9_.eE+]+?)([KMB]?)", value.upper())
            ):
                return cls(params=round(float(found[1]) * _MULTIPLIERS[found[2]]))
        except (ValueError, OverflowError):
            pass
        raise ValueError(f"target: {_ACCEPTED}; got {text!r}")

    def __str__(self) -> str:
        return (
            f"sparsity={self.sparsity:g}" if self.sparsity is not None else f"params={self.params}"
        )

    def removal_budget(self, layout: Layout) -> int:
        """Number of decoder parameters to remove from this model.

        Raises:
            ValueError: the model is that small already, or what cannot be removed is larger than
                the target.
        """
        size = layout.num_model_parameters
        if self.sparsity is not None:
            budget = math.floor(self.sparsity * layout.num_decoder_parameters)
        else:
            assert self.params is not None
            budget = size - self.params
            if budget <= 0:
                raise ValueError(f"target {self}: the model has {size} parameters; ask for fewer")
        removable = layout.num_removed_parameters(torch.zeros(len(layout), dtype=torch.bool))
        if budget > removable:
            raise ValueError(
                f"target {self}: {size - removable} of the model's {size} parameters cannot be "
                f"removed (embeddings, LM head, final norm), but {size - budget} are asked for"
            )
        return budget
