"""Weights that pruning has set to zero, and that training must leave at zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming.access import bring_in_layer
from bonsai_fast.models import find_decoder

# share of the decoder's weights that are zero here and not in the parent, from which on a model
# counts as sparse
SPARSE_FROM = 0.01


@dataclass(frozen=True, eq=False)
class ZeroMasks:
    """The zeros of a sparse model.

    Attributes:
        keep: by parameter name, bool of its shape on the CPU: True where the weight may change.
            Only linear layers of the decoder that have zeros are there.
    """

    keep: dict[str, Tensor]

    @property
    def count(self) -> int:
        """Number of zeros."""
        return sum(int((~keep).sum()) for keep in self.keep.values())

    def check(self, model: PreTrainedModel) -> None:
        """Assert that all of them still are zero."""
        for name, keep in self.keep.items():
            weight = model.get_parameter(name)
            assert not bool((weight != 0)[~keep.to(weight.device)].any()), f"{name} lost its zeros"


def find_zeros(student: PreTrainedModel, teacher: PreTrainedModel) -> ZeroMasks | None:
    """The zeros of a model whose single weights were pruned; None if it is not sparse.

    Zeros that the parent has, too, do not make a model sparse; in a sparse one, they are kept.
    """
    path = find_decoder(student).path
    layers = list(student.get_submodule(path).children())
    linear = [
        (number, f"{path}.{number}.{name}.weight", module.weight.detach())
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    needed = SPARSE_FROM * sum(weight.numel() for _, _, weight in linear)
    counts = {name: weight.numel() - int(weight.count_nonzero()) for _, name, weight in linear}
    if sum(counts.values()) < max(1, needed):
        return None
    keep, zeros = {}, 0
    for number, name, weight in linear:
        if counts[name]:
            is_kept = weight != 0
            bring_in_layer(teacher, number)
            zeros += int((~is_kept & ~_zeros_of(teacher, name, is_kept)).sum())
            keep[name] = is_kept.cpu()
    return ZeroMasks(keep) if zeros >= needed else None


def _zeros_of(teacher: PreTrainedModel, name: str, like: Tensor) -> Tensor:
    """Where the parent's weight is zero, too; nowhere if it has another shape."""
    try:
        weight = teacher.get_parameter(name).detach()
    except AttributeError:
        return torch.zeros_like(like)
    return (weight == 0).to(like.device) if weight.shape == like.shape else torch.zeros_like(like)
