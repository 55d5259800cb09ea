"""Other data in the place of a model's tensors for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def exchanged(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, every first tensor (a parameter or buffer) has the data of the second.

    Nothing is copied; the tensors' own data comes back when this ends, however it ends.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor, other in pairs:
            before.append((tensor, tensor.data))
            tensor.data = other
        yield
    finally:
        for tensor, data in reversed(before):
            tensor.data = data


def resident(
    module: nn.Module, device: torch.device, *, without: Iterable[nn.Module] = ()
) -> AbstractContextManager[None]:
    """Inside, a module's tensors are on a device; afterwards the copies there are gone.

    Args:
        module: any module; what is on the device already is not copied.
        device: where to.
        without: modules inside it that stay where they are.
    """
    staying = {id(part) for left_out in without for part in left_out.modules()}
    tensors = {
        id(tensor): tensor
        for part in module.modules()
        if id(part) not in staying
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    }
    return exchanged((tensor, tensor.data.to(device)) for tensor in tensors.values())
