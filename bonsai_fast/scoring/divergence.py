"""KL divergence of sub-models from their parent.

Where logits are linear in the last hidden states, no second set of logits is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bonsai_fast import ops
from bonsai_fast.scoring.sequence_nll import MIN_LOGIT_ROWS, SequenceNLL, predicting_states


@dataclass(frozen=True, eq=False)
class ParentReference:
    """What the parent predicts for a text, reduced to what a divergence from it needs.

    Attributes:
        states: float32 [B, T - 1, D], the LM head's rows averaged with the parent's probabilities;
            if the model caps its logits, the parent's last hidden states in its dtype.
        constant: float32 [B, T - 1], sum of p log p, minus the head's bias averaged likewise; if
            the model caps its logits, the sum alone.
    """

    states: Tensor
    constant: Tensor

    @classmethod
    @torch.inference_mode()
    def of_states(cls, nll: SequenceNLL, states: Tensor) -> ParentReference:
        """Make it from the parent's last hidden states.

        Args:
            nll: the parent's LM head.
            states: [B, T, D], after the final norm.
        """
        weight, bias = nll.head.weight.float(), getattr(nll.head, "bias", None)
        found, constants = [], []
        for hidden in predicting_states(states).split(_rows_of_two(nll)):
            log_p = nll.logits(hidden).float().log_softmax(dim=-1)
            p = log_p.exp()
            constant = (p * log_p).nan_to_num(0.0).sum(dim=-1)
            if not nll.is_linear:
                found.append(hidden)
            else:
                found.append(nll.scale * (p @ weight))
                if bias is not None:
                    constant = constant - nll.scale * (p @ bias.float())
            constants.append(constant)
        shape = (states.shape[0], states.shape[1] - 1)
        return cls(torch.cat(found).view(*shape, -1), torch.cat(constants).view(shape))

    def rows(self, sequences: Tensor) -> ParentReference:
        """The sequences with these numbers, int64 [R]."""
        return ParentReference(self.states[sequences], self.constant[sequences])

    def to(self, device: torch.device) -> ParentReference:
        """The same on another device."""
        return ParentReference(self.states.to(device), self.constant.to(device))

    @classmethod
    def cat(cls, parts: list[ParentReference]) -> ParentReference:
        """Join references of consecutive sequences, on the CPU."""
        return cls(
            torch.cat([part.states.cpu() for part in parts]),
            torch.cat([part.constant.cpu() for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Divergence:
    """Measures sub-models by their mean KL divergence from the parent; see `Measure`.

        KL(p || q) = sum p log p - sum p z_q + log sum exp z_q

    Where z_q is linear in the hidden state, the middle sum needs no second set of logits. A cap
    makes it need the parent's, which costs as much as the sub-model's own.

    Attributes:
        nll: the parent's LM head.
        reference: what the parent predicts for the text.
    """

    nll: SequenceNLL
    reference: ParentReference

    @torch.inference_mode()
    def __call__(self, states: Tensor, input_ids: Tensor, sequences: Tensor) -> Tensor:
        """See `Measure`."""
        parent = self.reference.rows(sequences).to(states.device)
        rows, length = input_ids.shape
        hidden, labels = predicting_states(states), input_ids[:, 1:].reshape(-1)
        of_parent, linear = parent.states.flatten(0, 1), self.nll.is_linear
        step = self.nll.logit_rows if linear else _rows_of_two(self.nll)
        costs = []
        for part, other, targets in zip(
            hidden.split(step), of_parent.split(step), labels.split(step), strict=True
        ):
            logits = self.nll.logits(part)
            log_sum = ops.token_nll(logits, targets) + logits.gather(1, targets[:, None])[:, 0]
            if linear:
                expected = torch.einsum("nd,nd->n", part.float(), other)
            else:
                p = self.nll.logits(other).float().softmax(dim=-1)
                expected = torch.einsum("nv,nv->n", p, logits.float())
            costs.append(log_sum - expected)
        tokens = parent.constant.flatten() + torch.cat(costs)
        return tokens.view(rows, length - 1).mean(dim=1, dtype=torch.float64).float()


def _rows_of_two(nll: SequenceNLL) -> int:
    """Number of tokens for which two float32 sets of logits are held at once."""
    return max(MIN_LOGIT_ROWS, nll.logit_rows // 4)
