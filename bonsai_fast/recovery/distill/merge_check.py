"""What merging changes: logits of some tokens, before and after."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from bonsai_fast.recovery.distill.distillation_loss import LogitHead
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.scoring.sequence_nll import predicting_states

# tokens that are compared
TOKENS = 128


@torch.no_grad()
def some_logits(
    nll: SequenceNLL, input_ids: Tensor, context: AbstractContextManager[object]
) -> Tensor:
    """Logits of the first tokens of a text, [N, V] in float32 at least.

    Args:
        nll: of the model.
        input_ids: int64 [B, T].
        context: in which the model is run.
    """
    head = LogitHead.of(nll)
    with context:
        states = nll.states(input_ids[:1, : TOKENS + 1].to(head.weight.device))
    hidden = predicting_states(states).to(head.dtype)
    return head.logits(hidden, head.weight)
