"""What references of several ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32, so that a reference does not round on the way; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activate_reference(x: Tensor, activation: str) -> Tensor:
    """The four activations by their formulas, element by element."""
    if activation == "silu":
        return x / (1 + (-x).exp())
    if activation == "gelu":
        return x * (1 + (x / math.sqrt(2)).erf()) / 2
    if activation == "gelu_tanh":
        return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2
    return torch.where(x < 0, torch.zeros_like(x), x)


def pick_kept(units: Tensor, keep: Tensor, row_group: Tensor, num_slots: int) -> Tensor:
    """Each row's kept units next to each other, then zeros: [T, N, ...] -> [T, num_slots, ...].

    Args:
        units: [T, N, ...], all N units of each row.
        keep: bool [K, N].
        row_group: int [T], the row's sub-model.
    """
    out = units.new_zeros(len(units), num_slots, *units.shape[2:])
    for row, group in enumerate(row_group.tolist()):
        out[row, : int(keep[group].sum())] = units[row, keep[group]]
    return out


def put_back(slots: Tensor, keep: Tensor, row_group: Tensor) -> Tensor:
    """The inverse of `pick_kept`: zeros for removed units, [T, slots, ...] -> [T, N, ...]."""
    out = slots.new_zeros(len(slots), keep.shape[1], *slots.shape[2:])
    for row, group in enumerate(row_group.tolist()):
        out[row, keep[group]] = slots[row, : int(keep[group].sum())]
    return out


def output_projection(
    x: Tensor, weight_t: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x [T, I] @ weight_t [I, N], plus bias [N] and residual [T, N] where given: [T, N]."""
    out = wide(x @ weight_t)
    for term in (bias, residual):
        if term is not None:
            out = out + term
    return out.to(x.dtype)
