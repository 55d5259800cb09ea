"""What the sub-layers of a model return: a tensor, or a tuple of how many things."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models import Decoder
from bonsai_fast.models.layer_runs import FAILURES, run_decoder, traced
from bonsai_fast.models.stand_in import make_stand_in


def returned_values(model: PreTrainedModel, decoder: Decoder) -> dict[str, int | None]:
    """Run a few tokens through a cheap copy of a model's decoder.

    Args:
        model: of a stock class, in memory, streamed or on the meta device; it is not run itself.
        decoder: found in it.
    Returns:
        for the first module of each sub-layer the length of the tuple that it returns, or None for
        a tensor; nothing of what the run did not reach.
    """
    # the outermost module that the finder has run, too
    whole = model.get_decoder()
    if not any(isinstance(module, nn.ModuleList) for module in whole.modules()):
        whole = model.base_model
    path = next(name for name, module in model.named_modules() if module is whole)
    stand_in = make_stand_in(whole)
    found: dict[str, int | None] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = len(output) if isinstance(output, tuple) else None

        return hook

    for block in decoder.blocks():
        name = block.modules[0]
        inside = name.removeprefix(f"{path}.") if path else name
        stand_in.decoder.get_submodule(inside).register_forward_hook(note(name))
    with traced(), suppress(*FAILURES):
        run_decoder(stand_in)
    return found
