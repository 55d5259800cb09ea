"""Which weights of a model in memory were changed, and the changed ones on disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bonsai_fast.models import find_decoder
from bonsai_fast.runs.layer_record import LayerRecord

# integers that hold the bits of a number
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Mark = tuple[int, int]


def weight_marks(model: PreTrainedModel) -> dict[str, Mark]:
    """A short mark of every parameter; another one as soon as a bit of it changes."""
    return {name: _mark(parameter.detach()) for name, parameter in model.named_parameters()}


def save_changes(model: PreTrainedModel, before: Mapping[str, Mark], record: LayerRecord) -> None:
    """Record the parameters that differ from when the marks were made.

    Args:
        model: in memory.
        before: `weight_marks` of it.
        record: of its decoder layers; parameters outside of them are recorded as one more layer.
    Raises:
        OSError: a file cannot be written.
    """
    now = weight_marks(model)
    found: dict[int, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if now[name] != before[name]:
            found.setdefault(_layer_of(model, name), {})[name] = parameter.detach()
    for number, weights in found.items():
        record.save(number, weights)


@torch.no_grad()
def restore_changes(model: PreTrainedModel, record: LayerRecord) -> None:
    """Give a model the recorded parameters.

    Raises:
        LedgerError: the record is damaged.
    """
    for number in range(find_decoder(model).num_layers + 1):
        for name, weights in (record.find(number) or {}).items():
            model.get_parameter(name).copy_(weights)


def _mark(tensor: Tensor) -> Mark:
    bits = tensor.contiguous().view(BITS[tensor.element_size()]).flatten()
    even, odd = (int(half.sum(dtype=torch.int64)) for half in (bits[::2], bits[1::2]))
    return even, odd


def _layer_of(model: PreTrainedModel, name: str) -> int:
    """Number of the decoder layer that a parameter is in, or of layers if it is outside."""
    decoder = find_decoder(model)
    inside = name.startswith(f"{decoder.path}.")
    return int(name[len(decoder.path) + 1 :].partition(".")[0]) if inside else decoder.num_layers
