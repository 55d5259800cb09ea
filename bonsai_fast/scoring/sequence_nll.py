"""Sequences in, mean negative log-likelihood out, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast import ops

# rows of logits held at once: so many amortise reading the LM head, fewer would not
MAX_LOGIT_ROWS = 2048
MIN_LOGIT_ROWS = 16
LOGIT_CHUNK_BYTES = 256 * 2**20


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off inside, the model's own mode back outside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True, eq=False)
class ParentReference:
    """What the parent predicts, as far as a divergence from it needs to know.

    Attributes:
        mean_weight: float32 [R, T - 1, D], the LM head's rows averaged by the parent's predictions.
        constant: float32 [R, T - 1], sum p log p less the head's averaged bias.
    """

    mean_weight: torch.Tensor
    constant: torch.Tensor

    def rows(self, index: torch.Tensor) -> ParentReference:
        """The sequences at these positions, int64 [R']."""
        return ParentReference(self.mean_weight[index], self.constant[index])

    def to(self, device: torch.device) -> ParentReference:
        """The same on another device."""
        return ParentReference(self.mean_weight.to(device), self.constant.to(device))

    @classmethod
    def cat(cls, parts: list[ParentReference]) -> ParentReference:
        """References of several stretches of text as one, on the CPU."""
        return cls(
            torch.cat([part.mean_weight.cpu() for part in parts]),
            torch.cat([part.constant.cpu() for part in parts]),
        )


class SequenceNLL:
    """Next-token loss of a causal language model, computed from its last hidden states in chunks.

    The model is used as it is: hooks that stand on its modules act. Its LM head is applied to a few
    thousand tokens at a time and the loss is taken in float32, so that the memory for logits does
    not depend on how many tokens come.

    Args:
        model: the model.
        logit_bytes: bytes of logits that are held at once, if that is less than the default.
    Attributes:
        without_logits: whether losses come from one op over LM head and hidden states, so that no
            logit is ever written, instead of from chunks of logits.
    Raises:
        ValueError: the model's logits are not its LM head (with a known scale or softcap) on its
            last hidden states.
    """

    def __init__(self, model: PreTrainedModel, *, logit_bytes: int = LOGIT_CHUNK_BYTES) -> None:
        self.model = model
        self._logit_bytes = min(logit_bytes, LOGIT_CHUNK_BYTES)
        self.backbone = model.base_model
        head = model.get_output_embeddings()
        if head is None or self.backbone is model:
            raise ValueError(
                f"{type(model).__name__}: expected a causal language model with a backbone and an "
                f"LM head, e.g. from AutoModelForCausalLM"
            )
        self.head = cast(nn.Linear, head)
        config = model.config
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.vocab_size = self.head.weight.shape[0]
        self.without_logits = False
        with evaluation_mode(model):
            self._check_head()

    @property
    def bytes_per_logit_row(self) -> int:
        """Bytes of one token's logits and of what the loss makes of them."""
        return self.vocab_size * (self.head.weight.element_size() + 1)

    @property
    def logit_rows(self) -> int:
        """Tokens whose logits are held at once."""
        rows = self._logit_bytes // self.bytes_per_logit_row
        return max(MIN_LOGIT_ROWS, min(MAX_LOGIT_ROWS, rows))

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of every sequence.

        Args:
            input_ids: int64 [R, T] on the model's device, T >= 2.
        Returns:
            float32 [R] on the model's device, nats per predicted token (T - 1 of them).
        """
        return self.losses_of(self._states(input_ids), input_ids)

    @torch.inference_mode()
    def losses_of(self, states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of sequences whose last hidden states are known.

        Args:
            states: [R, T, D], behind the last norm.
            input_ids: int64 [R, T].
        Returns:
            float32 [R].
        """
        rows, length = input_ids.shape
        hidden, labels = _predicting(states), input_ids[:, 1:].reshape(-1)
        tokens = self._token_losses(hidden, labels)
        return tokens.view(rows, length - 1).mean(dim=1, dtype=torch.float64).float()

    def _token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[N, D] and [N] -> float32 [N]."""
        if self.without_logits and type(self.head) is nn.Linear:
            options = {"scale": self._scale, "softcap": self._softcap}
            found: torch.Tensor = ops.lm_head_nll(
                hidden, self.head.weight, labels, self.head.bias, **options
            )
            return found
        parts = zip(hidden.split(self.logit_rows), labels.split(self.logit_rows), strict=True)
        return torch.cat([ops.token_nll(self.logits(part), targets) for part, targets in parts])

    @torch.inference_mode()
    def parent(self, input_ids: torch.Tensor) -> ParentReference:
        """What `divergence` compares with: the model as it is, on the same sequences.

        Args:
            input_ids: int64 [R, T] on the model's device.
        Raises:
            ValueError: the model caps its logits, so that they are not linear in its hidden states.
        """
        if not self.is_linear:
            raise ValueError(f"{type(self.model).__name__} caps its logits: no divergence")
        return self.parent_of(self._states(input_ids))

    @torch.inference_mode()
    def parent_of(self, states: torch.Tensor) -> ParentReference:
        """The same from last hidden states [R, T, D], behind the last norm."""
        weight, bias = self.head.weight.float(), getattr(self.head, "bias", None)
        means, constants = [], []
        for hidden in _predicting(states).split(max(MIN_LOGIT_ROWS, self.logit_rows // 4)):
            log_p = self.logits(hidden).float().log_softmax(dim=-1)
            p = log_p.exp()
            means.append(self._scale * (p @ weight))
            constant = (p * log_p).nan_to_num(0.0).sum(dim=-1)
            if bias is not None:
                constant = constant - self._scale * (p @ bias.float())
            constants.append(constant)
        shape = (states.shape[0], states.shape[1] - 1)
        return ParentReference(torch.cat(means).view(*shape, -1), torch.cat(constants).view(shape))

    @torch.inference_mode()
    def divergence(self, input_ids: torch.Tensor, parent: ParentReference) -> torch.Tensor:
        """Mean KL divergence of every sequence from the parent's predictions.

            KL(p || q) = sum p log p - sum p z_q + log sum exp z_q

        The middle sum needs no second set of logits: z_q is linear in the hidden state.

        Args:
            input_ids: int64 [R, T] on the model's device.
            parent: of the same R sequences.
        Returns:
            float32 [R], nats per predicted token.
        """
        return self.divergence_of(self._states(input_ids), input_ids, parent)

    @torch.inference_mode()
    def divergence_of(
        self, states: torch.Tensor, input_ids: torch.Tensor, parent: ParentReference
    ) -> torch.Tensor:
        """The same from last hidden states [R, T, D], behind the last norm."""
        rows, length = input_ids.shape
        hidden, labels = _predicting(states), input_ids[:, 1:].reshape(-1)
        log_sums = []
        for states, targets in zip(
            hidden.split(self.logit_rows), labels.split(self.logit_rows), strict=True
        ):
            logits = self.logits(states)
            log_sums.append(
                ops.token_nll(logits, targets) + logits.gather(1, targets[:, None])[:, 0].float()
            )
        expected = torch.einsum("nd,nd->n", hidden.float(), parent.mean_weight.flatten(0, 1))
        tokens = parent.constant.flatten() - expected + torch.cat(log_sums)
        return tokens.view(rows, length - 1).mean(dim=1, dtype=torch.float64).float()

    @property
    def is_linear(self) -> bool:
        """Whether logits are linear in the hidden states, as `divergence` needs."""
        return self._softcap is None

    def _states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states, [R, T, D]."""
        states: torch.Tensor = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of last hidden states [N, D], as the model itself computes them."""
        logits: torch.Tensor = self.head(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    @torch.inference_mode()
    def _check_head(self) -> None:
        tokens = torch.arange(4, device=self.head.weight.device).view(1, 4) % self.vocab_size
        states: list[torch.Tensor] = []
        handle = self.backbone.register_forward_hook(
            lambda _, __, output: states.append(output.last_hidden_state)
        )
        try:
            expected = self.model(input_ids=tokens, use_cache=False).logits.float()
        finally:
            handle.remove()
        # OPT's head asks a part of the backbone, past the hook
        actual = self.logits(states[0] if states else self._states(tokens)).float()
        scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if not torch.allclose(actual, expected, rtol=1e-2, atol=1e-2 * scale, equal_nan=True):
            raise ValueError(
                f"{type(self.model).__name__}: its logits are not its LM head applied to its last "
                f"hidden states (largest difference "
                f"{float((actual - expected).abs().max()):.3g}); this model cannot be scored"
            )


def _predicting(states: torch.Tensor) -> torch.Tensor:
    """Hidden states that predict a token: [R, T, D] -> [R * (T - 1), D]."""
    return states[:, :-1].reshape(-1, states.shape[-1])
