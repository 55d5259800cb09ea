"""Mixtures of experts in which every row of a batch keeps its own experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.models import ExpertsBlock
from bonsai_fast.models.router_mask import router_masked
from bonsai_fast.scoring.expert_calls import channels_masked


@contextmanager
def experts_masked(model: PreTrainedModel, block: ExpertsBlock, keep: Tensor) -> Iterator[None]:
    """Inside, the router chooses for each row among the experts that the row keeps.

    Or, where a block's parts are channels, all experts have the channels that the row keeps. A row
    without any part gets zeros from the whole mixture, shared experts included.

    Args:
        model: the parent.
        block: one of its mixtures of experts.
        keep: bool [R, E] or [R, I] on its device.
    """
    some = keep.any(dim=1, keepdim=True)
    removed = ~keep & some
    with ExitStack() as stack:
        if bool(removed.any()) and block.unit == "channel":
            stack.enter_context(channels_masked(model.get_submodule(block.experts), removed))
        elif bool(removed.any()):
            stack.enter_context(router_masked(model.get_submodule(block.router), removed))
        if not bool(some.all()):
            hook = _zero_rows(~some[:, 0])
            stack.callback(model.get_submodule(block.module).register_forward_hook(hook).remove)
        yield


def _zero_rows(gone: Tensor):  # type: ignore[no-untyped-def]
    def zero_rows(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        rows = states.reshape(len(gone), -1, states.shape[-1])
        states = rows.masked_fill(gone[:, None, None], 0).view(states.shape)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return zero_rows
