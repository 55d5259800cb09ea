"""Distillation loss from last hidden states; the logits of a whole batch are never held."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bonsai_fast.scoring import SequenceNLL

# label of a token that does not count
IGNORED = -100
MIN_ROWS = 16
MAX_ROWS = 1024
# of one chunk; on a CPU, larger ones leave its cache: 128 rows of 49,152 logits are 20 % faster
# than 341
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 512 * 2**20}
# float32 copies of a chunk's logits: of both models, and of the gradient
COPIES = 4


@dataclass(frozen=True)
class LossTerms:
    """Weights of the terms of a training loss, each a mean over the tokens that count.

    Attributes:
        kl: of KL(parent || model) over the whole vocabulary, nats.
        reverse_kl: of KL(model || parent), nats.
        cross_entropy: of the loss of the next token of the text, nats.
        hidden: of the squared distance between the last hidden states of both models, as a share
            of the parent's squared norm.
    """

    kl: float = 0.0
    reverse_kl: float = 0.0
    cross_entropy: float = 0.0
    hidden: float = 0.0

    @property
    def need_parent(self) -> bool:
        """Whether the parent must be run at all."""
        return bool(self.kl or self.reverse_kl or self.hidden)


@dataclass(frozen=True, eq=False)
class LogitHead:
    """How a model makes logits of last hidden states: softcap(scale * (weight h + bias)).

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        scale: factor of the logits.
        softcap: logits become softcap * tanh(logits / softcap); None: they stay.
        dtype: of the products; the model's, also while the weight is trained in float32.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype

    @classmethod
    def of(cls, nll: SequenceNLL) -> LogitHead:
        """The LM head of a model, with what the model does to its logits."""
        bias = getattr(nll.head, "bias", None)
        weight = nll.head.weight
        return cls(weight, bias, nll.scale, nll.softcap, weight.dtype)

    def frozen(self, device: torch.device) -> LogitHead:
        """The same on a device, where it stays as it is when the model moves."""
        bias = None if self.bias is None else self.bias.detach().to(device)
        return replace(self, weight=self.weight.detach().to(device), bias=bias)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[N, D] -> [N, V] in at least float32; both arguments are in the head's dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def before(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """From d loss / d logits to d loss / d (weight h + bias); `gradient` is overwritten."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square())
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return gradient


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """Sums the loss of tokens from the last hidden states of a model and of its parent.

    Logits are computed for some rows at a time, and their gradient with respect to the hidden
    states is taken at once: beside the two states, memory is that of one chunk.

    Attributes:
        student, parent: the heads; the parent's is not trained.
        terms: the weights of the terms.
        chunk_bytes: limit for what is held of one chunk; None: set by the device.
    """

    student: LogitHead
    parent: LogitHead
    terms: LossTerms
    chunk_bytes: int | None = None

    @property
    def rows(self) -> int:
        """Tokens whose logits are held at once."""
        weight = self.student.weight
        limit = self.chunk_bytes or CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"])
        return max(MIN_ROWS, min(MAX_ROWS, limit // (4 * COPIES * weight.shape[0])))

    def __call__(self, hidden: Tensor, parent: Tensor | None, labels: Tensor) -> Tensor:
        """The loss, summed over the tokens that count.

        Args:
            hidden: [N, D] last hidden states of the trained model, after the final norm.
            parent: [N, D'] of the parent; None if no term needs it.
            labels: int64 [N], the tokens that follow; -100: the token does not count, in no term.
        Returns:
            a scalar in float32, or float64 if `hidden` is; differentiable with respect to `hidden`
            and to the student's head, if that is trained.
        """
        counted = labels != IGNORED
        if not bool(counted.all()):
            hidden, labels = hidden[counted], labels[counted]
            parent = None if parent is None else parent[counted]
        arguments: Any = (hidden, self.student.weight, self.student.bias, parent, labels, self)
        loss: Tensor = _ChunkedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss


class _ChunkedLoss(torch.autograd.Function):
    """The sum of `DistillationLoss`; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parent: Tensor | None,
        labels: Tensor,
        loss: DistillationLoss,
    ) -> Tensor:
        """See `DistillationLoss.__call__`."""
        precision = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.zeros_like(hidden, dtype=precision) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=precision) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=precision) if bias is not None else None
        dtype = loss.student.dtype
        own = weight.to(dtype)
        theirs = loss.parent.weight.to(loss.parent.dtype)
        total = hidden.new_zeros((), dtype=precision)
        for start in range(0, len(hidden), loss.rows):
            part = slice(start, start + loss.rows)
            h = hidden[part].to(dtype)
            logits = loss.student.logits(h, own)
            parent_logits = None
            if parent is not None and (loss.terms.kl or loss.terms.reverse_kl):
                parent_logits = loss.parent.logits(parent[part].to(loss.parent.dtype), theirs)
            value, gradient = _of_logits(logits, parent_logits, labels[part], loss.terms)
            total += value
            gradient = loss.student.before(gradient, logits)
            if of_bias is not None and needs_bias:
                of_bias += gradient.sum(dim=0)
            gradient = gradient.to(dtype)
            if of_hidden is not None:
                of_hidden[part] = gradient @ own
            if of_weight is not None:
                of_weight += gradient.T @ h
            if parent is not None and loss.terms.hidden:
                target = parent[part].to(precision)
                distance = hidden[part].to(precision) - target
                norm = target.square().sum(dim=-1, keepdim=True).clamp_min(1e-12)
                total += loss.terms.hidden * (distance.square() / norm).sum()
                if of_hidden is not None:
                    of_hidden[part] += 2 * loss.terms.hidden * distance / norm
        ctx.save_for_backward(
            None if of_hidden is None else of_hidden.to(hidden.dtype),
            None if of_weight is None else of_weight.to(weight.dtype),
            None if bias is None or of_bias is None else of_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        found = (
            gradient if gradient is None or not needed else gradient * outputs[0].to(gradient.dtype)
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        )
        return (*found, None, None, None)


def _of_logits(
    logits: Tensor, parent_logits: Tensor | None, labels: Tensor, terms: LossTerms
) -> tuple[Tensor, Tensor]:
    """Loss of some tokens, summed, and its gradient with respect to the logits, [N, V] each.

    With p of the parent and q of the model:
        KL(p || q) = sum p log(p / q)          gradient q - p
        R = KL(q || p) = sum q log(q / p)      gradient q (log(q / p) - R)
        cross-entropy = -log q[label]          gradient q - onehot(label)
    `parent_logits` is overwritten.
    """
    log_q = logits.log_softmax(dim=-1)
    q = log_q.exp()
    gradient = q * (terms.kl + terms.cross_entropy)
    total = logits.new_zeros(())
    if parent_logits is not None:
        log_p = parent_logits.log_softmax(dim=-1)
        if terms.reverse_kl:
            ratio = log_q - log_p
            divergence = (q * ratio).sum(dim=-1, keepdim=True)
            gradient += terms.reverse_kl * q * (ratio - divergence)
            total += terms.reverse_kl * divergence.sum()
        if terms.kl:
            p = log_p.exp()
            gradient.sub_(p, alpha=terms.kl)
            total += terms.kl * p.mul_(log_p.sub_(log_q)).sum()
    if terms.cross_entropy:
        rows = torch.arange(len(labels), device=labels.device)
        total -= terms.cross_entropy * log_q[rows, labels].sum()
        gradient[rows, labels] -= terms.cross_entropy
    return total, gradient
