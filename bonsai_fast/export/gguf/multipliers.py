"""Multipliers of a model (Granite), written into weights for a block that has none.

Granite scales embeddings by e, what every sub-layer adds by r, products of queries and keys by a,
and divides logits by s. LLaMA's block computes the same from other weights. Its hidden states are
those of the model divided by r: then sub-layers add what they compute, so that their matrices stay
as they are, and embeddings are scaled by e / r. Norms do not depend on the scale of their input if
their epsilon is divided by r^2. The final norm takes the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

# families with these multipliers, all under Granite's names
FAMILIES = ("granite",)


@dataclass(frozen=True)
class Multipliers:
    """What weights are multiplied by.

    Attributes:
        factors: by llama.cpp's name without layer and suffix, such as "attn_q".
        epsilon: what the epsilon of all norms is multiplied by.
    """

    factors: dict[str, float] = field(default_factory=dict)
    epsilon: float = 1.0

    def applied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the model as the file has it; float32 where it changes.

        Args:
            name: llama.cpp's, such as "blk.3.attn_q.bias".
            tensor: of the model.
        """
        factor = self.factors.get(name.split(".")[-2], 1.0)
        return tensor if factor == 1.0 else tensor.float() * factor


def multipliers_of(family: str, config: Any, head_dim: int) -> Multipliers:
    """Multipliers of a model with this configuration; none for families that have none.

    Args:
        family: the parent's model type.
        config: of the model.
        head_dim: width of a head, by whose root llama.cpp divides products of queries and keys.
    """
    if family not in FAMILIES:
        return Multipliers()
    embedding, residual = float(config.embedding_multiplier), float(config.residual_multiplier)
    logits = 1.0 / float(config.logits_scaling)
    if config.tie_word_embeddings:  # the LM head is scaled with the embeddings
        logits *= residual / embedding
    factors = {
        "token_embd": embedding / residual,
        "attn_q": float(config.attention_multiplier) * math.sqrt(head_dim),
        "output_norm": logits,
    }
    return Multipliers(factors, residual**-2)
