"""What the sub-layers of a model return: a tensor, or a tuple of how many things."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.models import Decoder


def returned_values(model: PreTrainedModel, decoder: Decoder) -> dict[str, int | None]:
    """Run two tokens through the model's structure on the meta device.

    Args:
        model: of a stock class, in memory, streamed or on the meta device; it is not run itself.
        decoder: found in it.
    Returns:
        for the first module of each sub-layer the length of the tuple that it returns, or None for
        a tensor; nothing of what the run did not reach.
    """
    with torch.device("meta"):
        structure = type(model)(copy.deepcopy(model.config)).eval()
    found: dict[str, int | None] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = len(output) if isinstance(output, tuple) else None

        return hook

    for block in decoder.blocks():
        path = block.modules[0]
        structure.get_submodule(path).register_forward_hook(note(path))
    # a forward pass may look at values, which are not there; what was reached until then is known
    with torch.no_grad(), suppress(RuntimeError, NotImplementedError, ValueError, TypeError):
        structure(torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=False)
    return found
