"""The engine for every supported family: the model itself, masked by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.config.choices import Route
from bonsai_fast.models import Block, ExpertsBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.divergence import ParentReference
from bonsai_fast.scoring.expert_masks import experts_masked
from bonsai_fast.scoring.interface import Measure, Progress
from bonsai_fast.scoring.output_hooks import OutputHooks
from bonsai_fast.scoring.output_weights import SubmodelOutputs
from bonsai_fast.scoring.sequence_nll import SequenceNLL, evaluation_mode
from bonsai_fast.scoring.working_set import rows_within


class HooksEngine:
    """Runs (sub-model, sequence) pairs as rows of one batch; every row has its own mask."""

    name = "hooks"

    def __init__(self, layout: Layout, nll: SequenceNLL, memory_budget: int) -> None:
        self.layout = layout
        self.nll = nll
        self._budget = memory_budget

    def rows_per_batch(self, length: int, *, own_outputs: bool = False) -> int:
        """See `Engine.rows_per_batch`."""
        return rows_within(self._budget, self.layout, self.nll, length, own_outputs=own_outputs)

    def submodels_per_chunk(self, sequences: int, length: int, *, own_outputs: bool = False) -> int:
        """As many as fit into a batch: sub-models share no work here."""
        return max(1, self.rows_per_batch(length, own_outputs=own_outputs) // sequences)

    def check_own_outputs(self) -> None:
        """Nothing is refused."""

    def route_for(self, keep: Tensor, sequences: int, length: int) -> None:
        """None: there is only one route."""

    def score(
        self,
        keep: Tensor,
        input_ids: Tensor,
        measure: Measure,
        *,
        outputs: SubmodelOutputs | None = None,
        route: Route | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """See `Engine.score`."""
        sequences, device = len(input_ids), self.nll.head.weight.device
        found = torch.empty(len(keep) * sequences, dtype=torch.float32)
        step = self.rows_per_batch(input_ids.shape[1], own_outputs=outputs is not None)
        if outputs is not None and step > sequences:
            # whole sub-models: each batch makes their output projections again
            step -= step % sequences
        for start in range(0, len(found), step):
            pairs = torch.arange(start, min(start + step, len(found)))
            text, submodels = pairs % sequences, pairs // sequences
            tokens, kept = input_ids[text].to(device), keep[submodels].to(device)
            own = None if outputs is None else outputs.rows(submodels)
            with masked(self.nll.model, self.layout, kept, own):
                states = self._states(tokens)
            found[pairs] = measure(states, tokens, text).cpu()
            if progress is not None:
                progress(len(pairs))
        return found.view(len(keep), sequences)

    def parent_reference(self, input_ids: Tensor) -> ParentReference:
        """See `Engine.parent_reference`."""
        device = self.nll.head.weight.device
        return ParentReference.cat(
            [
                ParentReference.of_states(self.nll, self._states(rows.to(device)))
                for rows in input_ids.split(self.rows_per_batch(input_ids.shape[1]))
            ]
        )

    @torch.inference_mode()
    def _states(self, tokens: Tensor) -> Tensor:
        with evaluation_mode(self.nll.model):
            return self.nll.states(tokens)


@contextmanager
def masked(
    model: PreTrainedModel,
    layout: Layout,
    keep: Tensor,
    outputs: SubmodelOutputs | None = None,
) -> Iterator[None]:
    """Inside the context, row r of a batch runs through sub-model r.

    Args:
        model: the parent.
        layout: its units.
        keep: bool [R, P] on its device.
        outputs: their own output projections; None: all have the parent's.
    """
    with ExitStack() as stack:
        for block, kept in layout.keep_by_block(keep):
            if isinstance(block, ExpertsBlock):
                # no sub-model has its own projections here: see `output_weights`
                stack.enter_context(experts_masked(model, block, kept))
                continue
            output = model.get_submodule(block.output)
            own = None if outputs is None else OutputHooks(block, kept.cpu(), outputs)
            if own is not None and own.any_own:
                stack.callback(output.register_forward_pre_hook(own.before).remove)
                stack.callback(output.register_forward_hook(own.after, prepend=True).remove)
            elif not bool(kept.all()):
                hook = _zero_removed(block, kept)
                stack.callback(output.register_forward_pre_hook(hook).remove)
        yield


def _zero_removed(block: Block, keep: Tensor):  # type: ignore[no-untyped-def]
    columns = keep.repeat_interleave(block.part_width, dim=1)
    removed = ~columns.unsqueeze(1)  # (R, 1, in_features)

    def zero_removed(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = inputs[0]
        # OPT flattens rows and tokens
        rows = states.reshape(len(removed), -1, states.shape[-1])
        # selected, not multiplied: NaN or Inf in a removed unit would survive as NaN * 0
        return (rows.masked_fill(removed, 0).view(states.shape), *inputs[1:])

    return zero_removed
