"""Perplexity of a model on a text, with the protocol that it was measured by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.scoring import SequenceNLL

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its protocol.

    Attributes:
        value: exp of the mean loss over all predicted tokens; inf if it overflows, nan if the model
            gives nan.
        standard_error: of the mean loss, over sequences, in nats; nan for a single sequence.
        dataset: source of the text.
        tokens: number of predicted tokens.
        window, stride: in tokens.
        sha256: hash of the tokens.
    """

    value: float
    standard_error: float
    dataset: str
    tokens: int
    window: int
    stride: int
    sha256: str

    @property
    def protocol(self) -> dict[str, Any]:
        """How the value was measured: all fields but the results."""
        return {
            "dataset": self.dataset,
            "tokens": self.tokens,
            "window": self.window,
            "stride": self.stride,
            "sha256": self.sha256,
        }


def perplexity(model: PreTrainedModel, sequences: Sequences) -> Perplexity:
    """Perplexity on windows without overlap; in each, all tokens but the first are predicted."""
    input_ids = sequences.input_ids
    length = input_ids.shape[1]
    nll = SequenceNLL(model)
    losses = torch.cat(
        [
            nll(batch.to(nll.head.weight.device)).cpu()
            for batch in input_ids.split(max(1, TOKENS_PER_BATCH // length))
        ]
    )
    return perplexity_of(losses, sequences)


def perplexity_of(losses: torch.Tensor, sequences: Sequences) -> Perplexity:
    """Perplexity from each sequence's mean loss, float [B], in nats."""
    windows, length = sequences.input_ids.shape
    losses = losses.double()
    mean = float(losses.mean())
    return Perplexity(
        value=math.exp(mean) if mean < 700 else mean if math.isnan(mean) else math.inf,
        standard_error=float(losses.std() / math.sqrt(windows)) if windows > 1 else math.nan,
        dataset=sequences.source,
        tokens=windows * (length - 1),
        window=length,
        stride=length,
        sha256=sequences.sha256,
    )
