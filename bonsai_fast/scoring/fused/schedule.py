"""How the fused engine divides its memory budget: states of a wave, and one chunk of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused.arithmetic.causal_attention import BLOCK_TOKENS
from bonsai_fast.scoring.fused.arithmetic.eight_bits import BLOCK_BYTES, block_rows
from bonsai_fast.scoring.sequence_nll import SequenceNLL
from bonsai_fast.scoring.working_set import LOGIT_SHARE, MAX_TOKENS, SAFETY, output_bytes

# largest share of the memory for rows that the chunk being computed may use
CHUNK_SHARE = 0.5
# least number of leaves of a wave if sequences are split: enough leaves to share prefixes well
MIN_LEAVES = 16
# of the sub-models' own output projections, as many are held as fit into this share of the budget
HELD_SHARE = 0.125
MAX_HELD = 16


@dataclass(frozen=True)
class Schedule:
    """How many (sub-model, sequence) pairs are processed together.

    Attributes:
        wave_rows: pairs whose states are held from the first layer to the last.
        chunk_rows: pairs that a sub-layer computes at once.
        slices: whether a slice of a sub-layer fits into memory, too.
        packs: whether a packed sub-layer fits beside the slice.
        held_outputs: number of sub-models' own output projections that are held at once.
    """

    wave_rows: int
    chunk_rows: int
    slices: bool
    packs: bool = False
    held_outputs: int = 1


@dataclass(frozen=True)
class FusedWorkingSet:
    """Estimated memory of the fused engine beside the weights, in bytes.

    Attributes:
        state: residual stream of a row.
        layer: temporaries of the widest sub-layer, for each row of a chunk.
        hidden: temporaries of the final norm and the LM head without logits, for each row of a
            chunk.
        fixed: attention mask, rotary tables, and for products in 8 bits the weights of a sub-layer
            and a block of rows.
        slices: slices of the largest sub-layer.
        pack: the largest sub-layer, packed.
        logits: one chunk of logits.
        max_chunk: number of rows above which a larger chunk is not faster.
        output: an output projection of a sub-model that has its own; 0 if none has.
        making: the same when it is made, in float32.
    """

    state: int
    layer: int
    hidden: int
    fixed: int
    slices: int
    pack: int
    logits: int
    max_chunk: int
    output: int = 0
    making: int = 0

    @classmethod
    def of(
        cls,
        layout: Layout,
        nll: SequenceNLL,
        length: int,
        *,
        low: bool = False,
        own_outputs: bool = False,
        parallel: bool = False,
        capped: bool = False,
    ) -> FusedWorkingSet:
        """Estimate it for sequences of `length` tokens.

        Args:
            layout: the units.
            nll: the model.
            length: of a sequence.
            low: whether products are in 8 bits.
            own_outputs: whether sub-models have their own output projections.
            parallel, capped: of the model's `Structure`.
        """
        element, width = nll.head.weight.element_size(), nll.head.weight.shape[1]
        attention, mlp = layout.decoder.attention.values(), layout.decoder.mlp.values()
        query = max((block.num_heads * block.head_dim for block in attention), default=0)
        key = max((block.num_kv_heads * block.head_dim for block in attention), default=0)
        most_heads = max((block.num_heads for block in attention), default=0)
        channels = max((block.num_channels for block in mlp), default=0)
        # input rows, their norm and its float32 copy, the output and its norm
        common = (4 * element + 4) * width
        if parallel:
            common += element * width  # what the MLP reads
        # query and rotated query; K, V, rotated K; norms of heads; result, K and V per query head
        heads = element * (3 * query + 4 * key + 3 * query) + 4 * max(0, query - width)
        if capped:  # scores and weights of a block; on CUDA copies of rotated heads
            heads += element * max(2 * BLOCK_TOKENS * most_heads, query + 2 * key)
        device = nll.head.weight.device.type
        # gate and up; on CUDA their activation as well, which is a new tensor
        per_token = common + max(heads, element * (3 if device == "cuda" else 2) * channels)
        if own_outputs:  # kept columns of the output projection's input
            per_token += element * max(query, channels)
        # a slice and a copy of the output projection; on CUDA two slices
        largest = width * max(
            2 * (2 * query + 2 * key) if device == "cuda" else 3 * query + 2 * key,
            2 * 3 * channels if device == "cuda" else 4 * channels,
        )
        fixed = length * (length + 4 * 4 * width)
        if low:
            fixed += width * max(2 * query + 2 * key, 3 * channels)
            widest = max(width, query, channels)
            fixed += block_rows(nll.head.weight.device) * widest * BLOCK_BYTES
        output, making = output_bytes(layout, width, element) if own_outputs else (0, 0)
        if low:  # and its 8-bit copy
            output += output // element
        return cls(
            # an MLP of a parallel layer reads older states
            state=(2 if parallel else 1) * length * width * element,
            layer=int(SAFETY * length * per_token),
            hidden=int(SAFETY * length * (element * 3 + 4) * width),
            fixed=int(SAFETY * fixed),
            slices=int(SAFETY * element * largest),
            # with room for candidates, and a copy of the output projection
            pack=int(SAFETY * element * width * max(3 * query + 2 * key, 7 * channels)),
            logits=int(SAFETY * nll.logit_rows * nll.bytes_per_logit_row),
            max_chunk=max(1, MAX_TOKENS.get(device, MAX_TOKENS["cpu"]) // length),
            output=output,
            making=making,
        )

    def schedule(self, budget: int) -> Schedule | None:
        """The largest chunk and wave that fit; None if not even one row fits."""
        both = self.slices + self.pack
        return (
            (self._schedule(budget, both) if both <= CHUNK_SHARE * budget else None)
            or self._schedule(budget, self.slices)
            or self._schedule(budget, 0)
        )

    def _schedule(self, budget: int, slices: int) -> Schedule | None:
        held = 1
        if self.output:
            held = max(1, min(MAX_HELD, int(HELD_SHARE * budget) // self.output))
        copies = slices + self._outputs(held)
        room = budget - self.fixed - copies
        chunk = max(1, min(self.max_chunk, int(CHUNK_SHARE * room) // self.layer))
        at_work = max(self.fixed + copies + chunk * self.layer, self.logits + chunk * self.hidden)
        wave = (budget - at_work) // self.state
        return Schedule(wave, chunk, slices > 0, slices > self.slices, held) if wave > 0 else None

    def _outputs(self, held: int) -> int:
        """Memory for own output projections: those held, one in another order, one being made."""
        return (held + 1) * self.output + self.making

    @property
    def least_budget(self) -> int:
        """The smallest budget in which a row fits, with logits in chunks."""
        head = max(self.hidden / (1 - LOGIT_SHARE), self.logits / LOGIT_SHARE)
        return math.ceil(self.state + max(self.fixed + self._outputs(1) + self.layer, head))


def waves(leaves: int, sequences: int, rows: int) -> Iterator[tuple[range, slice]]:
    """Cut all pairs into waves: ranges of leaves and of sequences, at most `rows` pairs each.

    Sequences are split first: on each sequence, sub-models share the same work.
    """
    some = sequences_together(leaves, sequences, rows)
    many = max(1, rows // some)
    for first in range(0, sequences, some):
        for start in range(0, leaves, many):
            yield (
                range(start, min(start + many, leaves)),
                slice(first, min(first + some, sequences)),
            )


def sequences_together(leaves: int, sequences: int, rows: int) -> int:
    """Number of sequences in a wave of at most `rows` pairs."""
    return min(sequences, max(1, rows // min(leaves, MIN_LEAVES)))
