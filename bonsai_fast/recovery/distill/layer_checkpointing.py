"""Gradient checkpointing: the inside of a layer is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bonsai_fast.models import find_decoder

_MEMORY = Path("/proc/meminfo")
# what a linear layer's inputs and outputs stand for: activations, norms and attention beside them
ACTIVATIONS = 2.0
# share of the free memory that activations may take
SHARE = 0.6


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, decoder layers keep their inputs for the backward pass, and nothing else.

    This asks nothing of the model's class, and works in evaluation mode.
    """
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a model without adapters."""
    return list(model.get_submodule(find_decoder(model).path).children())


def activation_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Estimate of what the backward pass of all decoder layers keeps for some tokens, bytes."""
    width = sum(
        module.in_features + module.out_features
        for layer in decoder_layers(model)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    )
    return int(ACTIVATIONS * tokens * width * model.dtype.itemsize)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


@dataclass(frozen=True)
class Batching:
    """How a batch is run.

    Attributes:
        rows: sequences that are run at once.
        checkpoints: whether layers are computed again in the backward pass.
    """

    rows: int
    checkpoints: bool


def fit_batch(model: PreTrainedModel, rows: int, length: int, *, reserved: int) -> Batching:
    """What fits into the free memory.

    On a GPU, fewer sequences at once come before checkpointing, which costs a third of the time. On
    a CPU they stay, so that results do not depend on the memory that is free.

    Args:
        model: without adapters.
        rows: sequences that shall be run at once.
        length: tokens of each.
        reserved: bytes that training will take besides.
    """
    free = free_bytes(model.device)
    if free is None:
        return Batching(rows, False)
    room, needed = SHARE * (free - reserved), activation_bytes(model, length)
    if model.device.type == "cuda":
        while rows > 1 and rows * needed > room:
            rows = -(-rows // 2)
    return Batching(rows, rows * needed > room)
