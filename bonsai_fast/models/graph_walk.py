"""What a tensor was computed from, read from its autograd graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Origins:
    """What a walk met.

    Attributes:
        marks: paths of the matrices that were met, in the order of the walk.
        leaves: ids of the parameters and inputs that were met.
        operations: names of the autograd nodes that were met, in the order of the walk.
    """

    marks: dict[str, None] = field(default_factory=dict)
    leaves: set[int] = field(default_factory=set)
    operations: list[str] = field(default_factory=list)


def origins(tensor: Tensor, *, through_matrices: bool) -> Origins:
    """Walk from a tensor back to what it was computed from.

    Args:
        through_matrices: go on behind the matrices that are met.
    """
    found, seen = Origins(), set[Any]()
    if tensor.grad_fn is None:
        if tensor.requires_grad:
            found.leaves.add(id(tensor))
        return found
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        found.operations.append(node.name())
        if hasattr(node, "variable"):
            found.leaves.add(id(node.variable))
        path = getattr(node, "path", None)
        if path is not None:
            found.marks[path] = None
            if not through_matrices:
                continue
        stack += [following for following, _ in node.next_functions if following is not None]
    return found
