"""How the fused engine spends its memory budget: a wave of states, and a chunk of rows at work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused.arithmetic.eight_bits import BLOCK_BYTES, block_rows
from bonsai_fast.scoring.sequence_nll import SequenceNLL
from bonsai_fast.scoring.working_set import LOGIT_SHARE, MAX_TOKENS, SAFETY

# of what is left for rows, at most so much goes to the chunk at work
CHUNK_SHARE = 0.5


@dataclass(frozen=True)
class Schedule:
    """How many (sub-model, sequence) pairs go together.

    Attributes:
        wave_rows: whose states are held, layer after layer.
        chunk_rows: at work in a sub-layer at once.
        slices: whether a sliced copy of a sub-layer fits, too.
        packs: whether a packed sub-layer fits beside it.
    """

    wave_rows: int
    chunk_rows: int
    slices: bool
    packs: bool = False


@dataclass(frozen=True)
class FusedWorkingSet:
    """Estimated needs of the fused engine beside the weights, in bytes.

    Attributes:
        state: a row's residual stream.
        layer: what the widest sub-layer needs for a row at work.
        hidden: what the last norm and the LM head need for a row at work, logits left out.
        fixed: attention mask, rotary tables, and for products in 8 bits the weights of a sub-layer
            and a block of rows.
        slices: sliced copies of the largest sub-layer.
        pack: a packed copy of it.
        logits: one chunk of logits.
        max_chunk: rows beyond which a larger chunk is no faster.
    """

    state: int
    layer: int
    hidden: int
    fixed: int
    slices: int
    pack: int
    logits: int
    max_chunk: int

    @classmethod
    def of(
        cls, layout: Layout, nll: SequenceNLL, length: int, *, low: bool = False
    ) -> FusedWorkingSet:
        """Estimate them for sequences of `length` tokens; `low`: products are in 8 bits."""
        element, width = nll.head.weight.element_size(), nll.head.weight.shape[1]
        attention, mlp = layout.decoder.attention.values(), layout.decoder.mlp.values()
        query = max((block.num_heads * block.head_dim for block in attention), default=0)
        key = max((block.num_kv_heads * block.head_dim for block in attention), default=0)
        channels = max((block.num_channels for block in mlp), default=0)
        # gathered rows, their norm and its float32 copy, the change
        common = (3 * element + 4) * width
        # query and its rotation; K, V and rotated K; norms of heads; attended, K and V spread out
        heads = element * (3 * query + 4 * key + 3 * query) + 4 * max(0, query - width)
        device = nll.head.weight.device.type
        # gate and up; where one pass makes the activation of both, that as well
        per_token = common + max(heads, element * (3 if device == "cuda" else 2) * channels)
        # a slice and the output projection's columns once more; two slices on CUDA
        largest = width * max(
            2 * (2 * query + 2 * key) if device == "cuda" else 3 * query + 2 * key,
            2 * 3 * channels if device == "cuda" else 4 * channels,
        )
        fixed = length * (length + 4 * 4 * width)
        if low:
            fixed += width * max(2 * query + 2 * key, 3 * channels)
            widest = max(width, query, channels)
            fixed += block_rows(nll.head.weight.device) * widest * BLOCK_BYTES
        return cls(
            state=length * width * element,
            layer=int(SAFETY * length * per_token),
            hidden=int(SAFETY * length * (element * 3 + 4) * width),
            fixed=int(SAFETY * fixed),
            slices=int(SAFETY * element * largest),
            # room for candidates included, the output projection's columns once more
            pack=int(SAFETY * element * width * max(3 * query + 2 * key, 7 * channels)),
            logits=int(SAFETY * nll.logit_rows * nll.bytes_per_logit_row),
            max_chunk=max(1, MAX_TOKENS.get(device, MAX_TOKENS["cpu"]) // length),
        )

    def schedule(self, budget: int) -> Schedule | None:
        """The largest chunk and wave that fit; None if not even one row does."""
        both = self.slices + self.pack
        return (
            (self._schedule(budget, both) if both <= CHUNK_SHARE * budget else None)
            or self._schedule(budget, self.slices)
            or self._schedule(budget, 0)
        )

    def _schedule(self, budget: int, slices: int) -> Schedule | None:
        room = budget - self.fixed - slices
        chunk = max(1, min(self.max_chunk, int(CHUNK_SHARE * room) // self.layer))
        at_work = max(self.fixed + slices + chunk * self.layer, self.logits + chunk * self.hidden)
        wave = (budget - at_work) // self.state
        return Schedule(wave, chunk, slices > 0, slices > self.slices) if wave > 0 else None

    @property
    def least_budget(self) -> int:
        """The smallest budget in which a row fits, chunks of logits being what they are."""
        head = max(self.hidden / (1 - LOGIT_SHARE), self.logits / LOGIT_SHARE)
        return math.ceil(self.state + max(self.fixed + self.layer, head))
