"""The universal engine: the model as it is, masked by hooks at its output projections' inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models import Block
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.interface import Progress
from bonsai_fast.scoring.sequence_nll import ParentReference, SequenceNLL, evaluation_mode
from bonsai_fast.scoring.working_set import rows_within


class HooksEngine:
    """Rows of (sub-model, sequence) pairs ride in one batch; every row has its own mask."""

    name = "hooks"

    def __init__(self, layout: Layout, nll: SequenceNLL, memory_budget: int) -> None:
        self.layout = layout
        self.nll = nll
        self._budget = memory_budget

    def rows_per_batch(self, length: int) -> int:
        """(sub-model, sequence) pairs that are scored at once."""
        return rows_within(self._budget, self.layout, self.nll, length)

    def submodels_per_call(self, sequences: int, length: int) -> int:
        """As many as share a batch: they have nothing else in common."""
        return max(1, self.rows_per_batch(length) // sequences)

    def one_route(
        self, keep: torch.Tensor, sequences: int, length: int
    ) -> AbstractContextManager[None]:
        """There is but one."""
        return nullcontext()

    def score(
        self,
        keep: torch.Tensor,
        input_ids: torch.Tensor,
        parent: ParentReference | None,
        progress: Progress | None,
    ) -> torch.Tensor:
        """See `Engine.score`."""
        sequences, device = len(input_ids), self.nll.head.weight.device
        found = torch.empty(len(keep) * sequences, dtype=torch.float32)
        step = self.rows_per_batch(input_ids.shape[1])
        for start in range(0, len(found), step):
            pairs = torch.arange(start, min(start + step, len(found)))
            text = pairs % sequences
            reference = None if parent is None else parent.rows(text).to(device)
            with evaluation_mode(self.nll.model):
                found[pairs] = self.score_rows(
                    keep[pairs // sequences].to(device), input_ids[text].to(device), reference
                ).cpu()
            if progress is not None:
                progress(len(pairs))
        return found.view(len(keep), sequences)

    def parent(self, input_ids: torch.Tensor) -> ParentReference:
        """See `Engine.parent`."""
        device = self.nll.head.weight.device
        with evaluation_mode(self.nll.model):
            return ParentReference.cat(
                [
                    self.nll.parent(rows.to(device))
                    for rows in input_ids.split(self.rows_per_batch(input_ids.shape[1]))
                ]
            )

    def score_rows(
        self, keep: torch.Tensor, input_ids: torch.Tensor, parent: ParentReference | None = None
    ) -> torch.Tensor:
        """Loss of row r's sequence under row r's sub-model.

        Args:
            keep: bool [R, P] on the model's device.
            input_ids: int64 [R, T] on the model's device.
            parent: what the parent predicts for these sequences; None: the loss itself is wanted.
        Returns:
            float32 [R], nats per predicted token: loss, or divergence from the parent.
        """
        with masked(self.nll.model, self.layout, keep):
            if parent is not None:
                return self.nll.divergence(input_ids, parent)
            return self.nll(input_ids)


@contextmanager
def masked(model: PreTrainedModel, layout: Layout, keep: torch.Tensor) -> Iterator[None]:
    """Inside, row r of a batch runs through sub-model r of the model.

    Args:
        model: the parent.
        layout: its units.
        keep: bool [R, P] on its device.
    """
    with ExitStack() as stack:
        for block, kept in layout.keep_by_block(keep):
            if not bool(kept.all()):
                output = model.get_submodule(block.output)
                hook = _zero_removed(block, kept)
                stack.callback(output.register_forward_pre_hook(hook).remove)
        yield


def _zero_removed(block: Block, keep: torch.Tensor):  # type: ignore[no-untyped-def]
    columns = keep.repeat_interleave(block.part_width, dim=1)
    removed = ~columns.unsqueeze(1)  # (R, 1, in_features)

    def zero_removed(
        module: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        states = inputs[0]
        # OPT flattens rows and tokens
        rows = states.reshape(len(removed), -1, states.shape[-1])
        # selected, not multiplied: NaN or Inf in a removed unit must not survive as NaN * 0
        return (rows.masked_fill(removed, 0).view(states.shape), *inputs[1:])

    return zero_removed
