"""Method "taylor": LLM-Pruner's first-order criterion. It is the only method with a backward pass.

The importance of a weight is the change of the loss without it, to first order: |w dL/dw|. That of
a unit is the sum over all its weights. Gradients of the weights and the activations of one sequence
are
in memory: about twice the memory of the other methods.

Source: Ma et al., arXiv:2305.11627, equation 3 element by element, importance summed over a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from bonsai_fast.config.choices import PresetName
from bonsai_fast.config.presets import Preset
from bonsai_fast.methods.allocation import equal_shares
from bonsai_fast.methods.importance.coupled import coupled_importance
from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.one_shot import cut
from bonsai_fast.methods.units.unit_options import PUBLISHED_SHAPE, SparingOptions
from bonsai_fast.models import Cut
from bonsai_fast.models.layout import Layout

# calibration sequences that gradients are summed over
SEQUENCES = 10


class Taylor:
    """Gradients on a few sequences, and a selection."""

    presets: Mapping[PresetName, Preset[SparingOptions]] = {
        "default": Preset(SparingOptions()),
        "paper": Preset(SparingOptions(**PUBLISHED_SHAPE, spare_first=4, spare_last=2), 32, None),
    }

    def plan(self, task: Task[SparingOptions]) -> Plan:
        """A forward and a backward pass; the backward one counts as two."""
        return Plan(1, 0, 3 * task.calibration.input_ids[:SEQUENCES].numel())

    def find(self, search: Search[SparingOptions]) -> torch.Tensor:
        """The units to keep, bool [P]."""
        task = search.task
        input_ids = task.calibration.input_ids[:SEQUENCES]

        def measure() -> torch.Tensor:
            search.reporter.warn("taylor runs a backward pass: it needs about twice the memory")
            return first_order_importance(task.model, task.layout, input_ids)

        importance = search.importance("parent", measure, 3 * input_ids.numel())
        return cut(search, equal_shares(task.layout, importance), task.budget)


def first_order_importance(
    model: PreTrainedModel, layout: Layout, input_ids: torch.Tensor
) -> torch.Tensor:
    """Sum of |w dL/dw| over the weights of every unit, L the mean loss.

    Args:
        model: the parent; its weights and their `grad` are as before afterwards.
        layout: its units.
        input_ids: int64 [B, T].
    Returns:
        float64 [P].
    """
    with weight_gradients(model, layout, input_ids) as gradients:

        def of_cut(found: Cut) -> torch.Tensor:
            weight = model.get_parameter(found.parameter).detach()
            salience = (weight.float() * gradients[found.parameter].float()).abs()
            others = [dim for dim in range(weight.dim()) if dim != found.dim]
            return salience.sum(dim=others, dtype=torch.float64) if others else salience

        return coupled_importance(layout, of_cut, reduction="sum")


@contextmanager
def weight_gradients(
    model: PreTrainedModel, layout: Layout, input_ids: torch.Tensor
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients of the mean loss by every prunable weight, by name; freed afterwards."""
    names = {found.parameter for block in layout.decoder.blocks() for found in block.cuts}
    before = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    training = model.training
    try:
        model.eval()
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in names)
            weight.grad = None
        with torch.enable_grad():
            for sequence in input_ids.to(model.device):
                loss = model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss
                (loss / len(input_ids)).backward()
        found = {}
        for name in names:
            gradient = model.get_parameter(name).grad
            assert gradient is not None, f"{name} takes no part in the loss"
            found[name] = gradient
        yield found
    finally:
        model.train(training)
        for weight, requires_grad, gradient in before:
            weight.requires_grad_(requires_grad)
            weight.grad = gradient
