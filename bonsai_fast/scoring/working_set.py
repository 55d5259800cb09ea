"""How many sequences are processed at once, so that scoring stays within its memory budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.output_weights import num_columns
from bonsai_fast.scoring.sequence_nll import SequenceNLL

# tokens in a batch; measured: larger batches are not faster
MAX_TOKENS = {"cpu": 4096, "cuda": 16384}
# share of the budget for logits, which can be computed in chunks of any size
LOGIT_SHARE = 0.25
# factor for allocator overhead and small temporaries that the estimate leaves out
SAFETY = 1.3


def logit_bytes_within(budget: int) -> int:
    """Limit for the logits that are held at once, bytes."""
    return int(LOGIT_SHARE * budget / SAFETY)


@dataclass(frozen=True)
class WorkingSet:
    """Estimated peak memory of a forward pass beside the weights, in bytes.

    The LM head runs after the layers, so the peak is the larger one of the two.

    Attributes:
        mask: the attention mask.
        layer: temporaries of the widest layer, for each sequence.
        logits: one chunk of logits.
        hidden: last hidden states, for each sequence.
        output: an output projection of sub-models that have their own.
    """

    mask: int
    layer: int
    logits: int
    hidden: int
    output: int = 0

    @classmethod
    def of(
        cls, layout: Layout, nll: SequenceNLL, length: int, *, own_outputs: bool = False
    ) -> WorkingSet:
        """Estimate it for sequences of `length` tokens.

        Args:
            layout: the units.
            nll: the model.
            length: of a sequence.
            own_outputs: whether sub-models have their own output projections.
        """
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
        # every chosen expert: its input and output, and what it computes between them
        experts = max(
            (
                block.top_k * (3 * hidden + 4 * block.num_channels)
                for block in layout.decoder.experts.values()
            ),
            default=0,
        )
        # residual, norm in and out, two float32 temporaries; the widest sub-layer, and that masked
        per_token = element * (4 * hidden + max(2 * width, 4 * channels, experts)) + 2 * 4 * hidden
        scores = 0
        if getattr(
            nll.model.config, "_attn_implementation", None
        ) == "eager" or layout.decoder.model_type.endswith("bloom"):
            # attention weights in the model's dtype, their float32 softmax and a copy of it
            heads = max((block.num_heads for block in attention), default=0)
            scores = heads * length**2 * (2 * element + 2 * 4)
        return cls(
            mask=int(SAFETY * length**2 * element),
            layer=int(SAFETY * (length * per_token + scores)),
            logits=int(SAFETY * nll.logit_rows * nll.bytes_per_logit_row),
            hidden=int(SAFETY * 3 * length * hidden * element),
            output=sum(output_bytes(layout, hidden, element)) if own_outputs else 0,
        )

    def rows_within(self, budget: int) -> int:
        """Number of sequences that fit; 0 if none fits."""
        room = budget - self.mask - self.output
        return min(room // self.layer, (budget - self.logits) // self.hidden)

    @property
    def least_budget(self) -> int:
        """The smallest budget in which a sequence fits, with logits in chunks."""
        return math.ceil(
            max(
                self.mask + self.output + self.layer,
                self.hidden / (1 - LOGIT_SHARE),
                self.logits / LOGIT_SHARE,
            )
        )


def output_bytes(layout: Layout, width: int, element: int) -> tuple[int, int]:
    """Memory of the largest output projection that a sub-model may have as its own, bytes.

    Args:
        layout: the units.
        width: D.
        element: bytes of a weight of the model.
    Returns:
        of one in the model's dtype, and of one as it is made, in float32.
    """
    columns = max(map(num_columns, layout.decoder.blocks()), default=0)
    return int(SAFETY * element * width * columns), int(SAFETY * 4 * width * columns)


def rows_within(
    budget: int, layout: Layout, nll: SequenceNLL, length: int, *, own_outputs: bool = False
) -> int:
    """Number of sequences of `length` tokens that fit into `budget` bytes, at least 1.

    Raises:
        ValueError: not even one sequence fits.
    """
    needs = WorkingSet.of(layout, nll, length, own_outputs=own_outputs)
    if needs.least_budget > budget:
        raise too_small(budget, needs.least_budget, length)
    rows = needs.rows_within(budget)
    # for every batch, a streamed model reads all weights, and own output projections are made again
    if stream_of(nll.model) is None and not own_outputs:
        limit = MAX_TOKENS.get(nll.head.weight.device.type, MAX_TOKENS["cpu"])
        rows = min(rows, limit // length)
    return max(1, rows)


def too_small(budget: int, least_budget: int, length: int) -> ValueError:
    """The error for a budget in which not even one sequence of `length` tokens fits."""
    return ValueError(
        f"memory budget: one sequence of {length} tokens needs about "
        f"{math.ceil(least_budget / 2**20)} MiB beside the weights, "
        f"got a budget of {budget / 2**20:.0f} MiB"
    )
