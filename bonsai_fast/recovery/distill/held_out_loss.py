"""The loss of a model on text that training does not read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from bonsai_fast.recovery.distill.distillation_loss import DistillationLoss, LogitHead, LossTerms
from bonsai_fast.recovery.distill.processes import Processes
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.scoring.sequence_nll import predicting_states

TOKENS_AT_ONCE = 4096


class HeldOutLoss:
    """Measures the next-token loss, on every process's share of the text.

    Args:
        nll: of the model.
        head: its LM head.
        input_ids: int64 [B, T] on the CPU.
        processes: that measure together.
        context: in which the model is run.
    """

    def __init__(
        self,
        nll: SequenceNLL,
        head: LogitHead,
        input_ids: Tensor,
        *,
        processes: Processes,
        context: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._nll, self._input_ids, self._processes = nll, input_ids, processes
        self._loss = DistillationLoss(head, head, LossTerms(cross_entropy=1.0))
        self._context = context

    @torch.no_grad()
    def __call__(self) -> float:
        """Nats per predicted token."""
        device, length = self._nll.model.device, self._input_ids.shape[1]
        total = torch.zeros((), dtype=torch.float32, device=device)
        mine = self._input_ids[self._processes.index :: self._processes.count]
        for part in mine.split(max(1, TOKENS_AT_ONCE // length)) if len(mine) else ():
            ids = part.to(device)
            with self._context():
                states = predicting_states(self._nll.states(ids))
            total += self._loss(states, None, ids[:, 1:].reshape(-1))
        return float(self._processes.sum(total)) / (len(self._input_ids) * (length - 1))
