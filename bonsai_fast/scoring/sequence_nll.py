"""Sequences in, mean negative log-likelihood out, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast import ops

# Rows of logits held at once. Above the maximum the LM head gets no faster; below the minimum its
# weights are read too often.
MAX_LOGIT_ROWS = 2048
MIN_LOGIT_ROWS = 16
LOGIT_CHUNK_BYTES = 256 * 2**20
# names that configurations have for a cap of the logits
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and restore the model's own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class SequenceNLL:
    """Next-token loss of a causal language model, computed from its last hidden states in chunks.

    The model is called as it is, so hooks on its modules run. The LM head is applied to at most
    2,048 tokens at a time and the loss is taken in float32, so the memory for logits does not
    depend on the amount of text.

    Args:
        model: the model.
        logit_bytes: limit for the logits that are held at once, in bytes; 256 MiB at most.
    Attributes:
        head: the LM head.
        scale: factor that the model applies to its logits.
        softcap: the model's logits are softcap * tanh(logits / softcap), scaled before; None: not.
        without_logits: whether one op computes losses from LM head and hidden states and never
            writes logits; otherwise they are computed from chunks of logits.
    Raises:
        ValueError: the model's logits are not its LM head (with a known scale or softcap) applied
            to its last hidden states.
    """

    def __init__(self, model: PreTrainedModel, *, logit_bytes: int = LOGIT_CHUNK_BYTES) -> None:
        self.model = model
        self._logit_bytes = min(logit_bytes, LOGIT_CHUNK_BYTES)
        self.backbone = model.base_model
        head = model.get_output_embeddings()
        if not hasattr(head, "weight") or self.backbone is model:
            raise ValueError(
                f"{type(model).__name__}: expected a causal language model with a backbone and an "
                f"LM head, e.g. from AutoModelForCausalLM"
            )
        self.head = cast(nn.Linear, head)
        config = model.config
        caps = (getattr(config, name, None) for name in SOFTCAPS)
        self.softcap = next((cap for cap in caps if cap is not None), None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.vocab_size = self.head.weight.shape[0]
        self.without_logits = False
        with evaluation_mode(model):
            self._check_head()

    @property
    def bytes_per_logit_row(self) -> int:
        """Memory for one token's logits and the loss's temporaries, bytes."""
        return self.vocab_size * (self.head.weight.element_size() + 1)

    @property
    def logit_rows(self) -> int:
        """Number of tokens whose logits are held at once."""
        rows = self._logit_bytes // self.bytes_per_logit_row
        return max(MIN_LOGIT_ROWS, min(MAX_LOGIT_ROWS, rows))

    @property
    def is_linear(self) -> bool:
        """Whether logits are linear in the hidden states."""
        return self.softcap is None

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of every sequence.

        Args:
            input_ids: int64 [R, T] on the model's device, T >= 2.
        Returns:
            float32 [R] on the model's device, nats per predicted token (T - 1 per sequence).
        """
        return self.losses_of(self.states(input_ids), input_ids)

    def states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states [R, T, D], after the final norm, of int64 [R, T]."""
        states: torch.Tensor = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    @torch.inference_mode()
    def losses_of(self, states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of sequences whose last hidden states are known.

        Args:
            states: [R, T, D], after the final norm.
            input_ids: int64 [R, T].
        Returns:
            float32 [R], nats per predicted token.
        """
        rows, length = input_ids.shape
        hidden, labels = predicting_states(states), input_ids[:, 1:].reshape(-1)
        tokens = self._token_losses(hidden, labels)
        return tokens.view(rows, length - 1).mean(dim=1, dtype=torch.float64).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of last hidden states [N, D], as the model itself computes them."""
        logits: torch.Tensor = self.head(hidden)
        # in place: the memory budget has room for one such tensor
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def _token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[N, D] and [N] -> float32 [N]."""
        if self.without_logits and type(self.head) is nn.Linear:
            options = {"scale": self.scale, "softcap": self.softcap}
            found: torch.Tensor = ops.lm_head_nll(
                hidden, self.head.weight, labels, self.head.bias, **options
            )
            return found
        parts = zip(hidden.split(self.logit_rows), labels.split(self.logit_rows), strict=True)
        return torch.cat([ops.token_nll(self.logits(part), targets) for part, targets in parts])

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
        # OPT calls a part of the backbone, so the hook does not run
        actual = self.logits(states[0] if states else self.states(tokens)).float()
        scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
        # a cap that is not known changes small logits little
        near = 1e-4 if self.head.weight.dtype == torch.float32 else 1e-2
        if not torch.allclose(actual, expected, rtol=near, atol=near * scale, equal_nan=True):
            raise ValueError(
                f"{type(self.model).__name__}: its logits are not its LM head applied to its last "
                f"hidden states (largest difference "
                f"{float((actual - expected).abs().max()):.3g}); this model cannot be scored"
            )


def predicting_states(states: torch.Tensor) -> torch.Tensor:
    """Hidden states that predict a token: [R, T, D] -> [R * (T - 1), D]."""
    return states[:, :-1].reshape(-1, states.shape[-1])
