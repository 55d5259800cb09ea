"""How many sequences may be in flight at once, so that scoring stays within its memory budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.sequence_nll import SequenceNLL

# measured: beyond these, larger batches are no faster
MAX_TOKENS = {"cpu": 4096, "cuda": 16384}
# of the budget, for logits; they come in chunks of any size
LOGIT_SHARE = 0.25
# allocator slack and small temporaries that the estimate leaves out
SAFETY = 1.3


def logit_bytes_within(budget: int) -> int:
    """Bytes of logits that may be held at once."""
    return int(LOGIT_SHARE * budget / SAFETY)


@dataclass(frozen=True)
class WorkingSet:
    """Estimated peak of a forward pass beside the weights, in bytes.

    Layers and LM head are never at work at once: the peak is that of the larger.

    Attributes:
        mask: the attention mask, while layers run.
        layer: what the widest layer holds for each sequence.
        logits: one chunk of logits.
        hidden: last hidden states of each sequence, while logits are made of them.
    """

    mask: int
    layer: int
    logits: int
    hidden: int

    @classmethod
    def of(cls, layout: Layout, nll: SequenceNLL, length: int) -> WorkingSet:
        """Estimate it for sequences of `length` tokens."""
        element = nll.head.weight.element_size()
        hidden = nll.head.weight.shape[1]
        attention = layout.decoder.attention.values()
        width = (
            max(
                (2 * block.num_heads + 2 * block.num_kv_heads) * block.head_dim
                for block in attention
            )
            if attention
            else 0
        )
        channels = max((block.num_channels for block in layout.decoder.mlp.values()), default=0)
        # residual, norm in and out, its two float32 temporaries; wider sub-layer with its masked
        # copy
        per_token = element * (4 * hidden + max(2 * width, 4 * channels)) + 2 * 4 * hidden
        scores = 0
        if getattr(
            nll.model.config, "_attn_implementation", None
        ) == "eager" or layout.decoder.model_type.endswith("bloom"):
            # attention weights in the model's dtype, their float32 softmax and its copy
            heads = max((block.num_heads for block in attention), default=0)
            scores = heads * length**2 * (2 * element + 2 * 4)
        return cls(
            mask=int(SAFETY * length**2 * element),
            layer=int(SAFETY * (length * per_token + scores)),
            logits=int(SAFETY * nll.logit_rows * nll.bytes_per_logit_row),
            hidden=int(SAFETY * 3 * length * hidden * element),
        )

    def rows_within(self, budget: int) -> int:
        """Sequences that fit; 0 if none does."""
        return min((budget - self.mask) // self.layer, (budget - self.logits) // self.hidden)

    @property
    def least_budget(self) -> int:
        """The smallest budget in which a sequence fits, chunks of logits being what they are."""
        return math.ceil(
            max(
                self.mask + self.layer,
                self.hidden / (1 - LOGIT_SHARE),
                self.logits / LOGIT_SHARE,
            )
        )


def rows_within(budget: int, layout: Layout, nll: SequenceNLL, length: int) -> int:
    """Sequences of `length` tokens that fit into `budget` bytes, at least 1.

    Raises:
        ValueError: not even one sequence fits.
    """
    needs = WorkingSet.of(layout, nll, length)
    if needs.least_budget > budget:
        raise ValueError(
            f"memory budget: one sequence of {length} tokens needs about "
            f"{math.ceil(needs.least_budget / 2**20)} MiB beside the weights, "
            f"got a budget of {budget / 2**20:.0f} MiB"
        )
    rows = needs.rows_within(budget)
    if stream_of(nll.model) is None:  # else every batch reads all weights
        limit = MAX_TOKENS.get(nll.head.weight.device.type, MAX_TOKENS["cpu"])
        rows = min(rows, limit // length)
    return max(1, rows)
