"""The processes that train one model together, each on its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

# gradients that are sent at once
BUCKET_BYTES = 64 * 2**20


class Processes:
    """One process, or those that `accelerate launch` or `torchrun` started.

    Each holds the whole model. Their gradients are summed before a step, so all make the same one.

    Args:
        device: of the model, as it was loaded.
    Attributes:
        count: number of processes.
        device: where this one trains: the given one, or one of several GPUs.
        index: number of this one.
    """

    def __init__(self, device: torch.device) -> None:
        # a tier before may keep the others waiting
        wait = {"timeout": timedelta(days=7)} if "WORLD_SIZE" in os.environ else {}
        self._state = PartialState(cpu=device.type == "cpu", **wait)
        self.count: int = self._state.num_processes
        self.index: int = self._state.process_index
        self.device: torch.device = self._state.device if self.count > 1 else device

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and decides."""
        return self.index == 0

    def wait(self) -> None:
        """Wait for all others."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count == 1:
            return value
        total: Tensor = reduce(value, reduction="sum")
        return total

    def of_main(self, value: float) -> float:
        """What the main process says, in all of them."""
        if self.count == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(broadcast(said, from_process=0))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the sum of all processes' gradients."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:  # this process had no sequence in the step
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.nbytes for gradient in bucket) >= BUCKET_BYTES:
                self._sum_all(bucket)
                bucket = []
        if bucket:
            self._sum_all(bucket)

    def _sum_all(self, tensors: list[Tensor]) -> None:
        joined = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, joined.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))
