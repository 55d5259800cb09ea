"""KL divergence of sub-models from their parent, without a second set of logits."""

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
        mean_weight: float32 [B, T - 1, D], the LM head's rows averaged with the parent's
            probabilities.
        constant: float32 [B, T - 1], sum of p log p, minus the head's bias averaged likewise.
    """

    mean_weight: Tensor
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
        means, constants = [], []
        for hidden in predicting_states(states).split(max(MIN_LOGIT_ROWS, nll.logit_rows // 4)):
            log_p = nll.logits(hidden).float().log_softmax(dim=-1)
            p = log_p.exp()
            means.append(nll.scale * (p @ weight))
            constant = (p * log_p).nan_to_num(0.0).sum(dim=-1)
            if bias is not None:
                constant = constant - nll.scale * (p @ bias.float())
            constants.append(constant)
        shape = (states.shape[0], states.shape[1] - 1)
        return cls(torch.cat(means).view(*shape, -1), torch.cat(constants).view(shape))

    def rows(self, sequences: Tensor) -> ParentReference:
        """The sequences with these numbers, int64 [R]."""
        return ParentReference(self.mean_weight[sequences], self.constant[sequences])

    def to(self, device: torch.device) -> ParentReference:
        """The same on another device."""
        return ParentReference(self.mean_weight.to(device), self.constant.to(device))

    @classmethod
    def cat(cls, parts: list[ParentReference]) -> ParentReference:
        """Join references of consecutive sequences, on the CPU."""
        return cls(
            torch.cat([part.mean_weight.cpu() for part in parts]),
            torch.cat([part.constant.cpu() for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Divergence:
    """Measures sub-models by their mean KL divergence from the parent; see `Measure`.

        KL(p || q) = sum p log p - sum p z_q + log sum exp z_q

    The middle sum needs no second set of logits: z_q is linear in the hidden state.

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
        step, log_sums = self.nll.logit_rows, []
        for part, targets in zip(hidden.split(step), labels.split(step), strict=True):
            logits = self.nll.logits(part)
            log_sums.append(
                ops.token_nll(logits, targets) + logits.gather(1, targets[:, None])[:, 0].float()
            )
        expected = torch.einsum("nd,nd->n", hidden.float(), parent.mean_weight.flatten(0, 1))
        tokens = parent.constant.flatten() - expected + torch.cat(log_sums)
        return tokens.view(rows, length - 1).mean(dim=1, dtype=torch.float64).float()
