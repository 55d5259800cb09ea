"""How a model is trained: everything that the training loop must know, besides text and models."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from bonsai_fast.config.choices import RecoverWeights, Tier
from bonsai_fast.recovery.distill.distillation_loss import LossTerms

Schedule = Literal["cosine", "linear"]
Adapted = Literal["all linear layers", "query and value projections"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyper-parameters of a tier that trains.

    Attributes:
        name: of the tier.
        weights: what is trained in the decoder layers.
        adapted: which linear layers get adapters, if adapters are trained.
        rank, scale, dropout: of adapters: weight + scale * B A, with A of `rank` rows.
        head: whether the LM head is trained, too.
        terms: of the loss.
        learning_rate: the highest one.
        schedule: how it falls, to 0 at the end.
        warmup_steps: steps in which it rises.
        batch: sequences per step.
        tokens: trained on in all.
        length: tokens per sequence, where the text gives as many.
        epochs: how often the text is read.
        published_tokens: those of the paper; None for a recipe of our own.
        clip: largest norm of the gradient.
    """

    name: Tier
    weights: RecoverWeights
    terms: LossTerms
    adapted: Adapted = "all linear layers"
    rank: int = 8
    scale: float = 2.0
    dropout: float = 0.0
    head: bool = False
    learning_rate: float
    schedule: Schedule = "cosine"
    warmup_steps: int = 5
    batch: int = 1
    tokens: int
    length: int = 512
    epochs: int = 1
    published_tokens: int | None = None
    clip: float = 1.0

    def with_tokens(self, tokens: int, length: int) -> Recipe:
        """The same on fewer or more tokens, in sequences of `length`.

        Of a published recipe, the batch shrinks with the tokens, so that fewer tokens still are as
        many steps; it never grows. The warm-up is at most a tenth of the steps.
        """
        batch = self.batch
        if self.published_tokens is not None:
            batch = min(batch, max(1, round(batch * tokens / self.published_tokens)))
        steps = tokens // (batch * length)
        warmup = min(self.warmup_steps, max(1, steps // 10))
        return replace(self, tokens=tokens, batch=batch, warmup_steps=warmup)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step.

        Args:
            step: number of steps made before.
            progress: share of the work that is done, in [0, 1].
        """
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        done = min(1.0, progress)
        fall = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * rise * fall

    def settings(self) -> dict[str, float | int | str]:
        """All hyper-parameters, as plain values that do not depend on the machine."""
        found: dict[str, float | int | str] = {"weights": self.weights}
        if self.weights == "lora":
            found |= {
                "adapted": self.adapted,
                "rank": self.rank,
                "scale": self.scale,
                "dropout": self.dropout,
            }
        found |= {
            "head": "trained" if self.head else "frozen",
            "kl": self.terms.kl,
            "reverse_kl": self.terms.reverse_kl,
            "cross_entropy": self.terms.cross_entropy,
            "hidden": self.terms.hidden,
            "optimiser": "AdamW, betas 0.9 and 0.999, no weight decay",
            "learning_rate": self.learning_rate,
            "schedule": self.schedule,
            "warmup_steps": self.warmup_steps,
            "batch": self.batch,
            "gradient_norm": self.clip,
            "tokens": self.tokens,
        }
        if self.published_tokens is not None:
            found["published_tokens"] = self.published_tokens
        return found
