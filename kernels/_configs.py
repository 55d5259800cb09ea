"""Launch configurations: one default per kernel and architecture, others only on request."""

from __future__ import annotations

import functools
import os

import torch
from triton import Config, autotune
from triton.runtime import Autotuner, KernelInterface


def tunable(best: Config, *candidates: Config) -> list[Config]:
    """`[best]`, or all of them when `BONSAI_FAST_AUTOTUNE=1` is set at import.

    With one configuration Triton measures nothing, so a run compiles once and is reproducible.
    """
    if os.environ.get("BONSAI_FAST_AUTOTUNE") == "1":
        return [best, *candidates]
    return [best]


def architecture(device: torch.device) -> str:
    """'hopper' where a block may have 227 KB of shared memory, else 'ampere' (99 KB)."""
    if device.type != "cuda":
        return "ampere"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "ampere"


def tuned(
    kernel: KernelInterface,
    configs: dict[tuple[str, int], tuple[Config, ...]],
    x: torch.Tensor,
    key: tuple[str, ...],
) -> Autotuner:
    """`kernel` with its configurations for the architecture and element size of `x`."""
    return _tuned(kernel, configs[architecture(x.device), x.element_size()], key)


@functools.cache
def _tuned(kernel: KernelInterface, configs: tuple[Config, ...], key: tuple[str, ...]) -> Autotuner:
    return autotune(configs=tunable(*configs), key=list(key))(kernel)


def tile(columns: int, depth: int, warps: int, stages: int) -> Config:
    """A matrix product's tile: BLOCK_N output columns, BLOCK_K terms a step."""
    return Config({"BLOCK_N": columns, "BLOCK_K": depth}, num_warps=warps, num_stages=stages)


def depth(terms: int, warps: int, stages: int) -> Config:
    """As `tile`, for kernels whose columns follow from the shape of the problem."""
    return Config({"BLOCK_K": terms}, num_warps=warps, num_stages=stages)
