"""What benches of single ops share: their axes, model shapes, and sub-models with units removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from bonsai_fast.testing.cases import MODEL_SHAPES, ModelShape, Wave, synchronized_timer

NUM_GROUPS = 4
ROWS_PER_GROUP = {"cpu": 64, "cuda": 1024}
# None is a tiny shape, which `make bench-smoke` runs.
SHAPES = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape, id=shape.name) for shape in MODEL_SHAPES),
]
WIDTHS = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape.intermediate_size, id=shape.name) for shape in MODEL_SHAPES),
]


def compare(**axes: Iterable[Any]) -> Callable[[Any], Any]:
    """Decorate a bench: run it for all combinations of the values of its arguments."""

    def decorate(bench: Any) -> Any:
        for name, values in axes.items():
            bench = pytest.mark.parametrize(name, values, ids=str)(bench)
        return pytest.mark.benchmark(timer=synchronized_timer)(bench)

    return decorate


def options_of(shape: ModelShape | None, device: torch.device) -> dict[str, Any]:
    """dtype and device of a bench's tensors: bfloat16, but float32 in a smoke run."""
    return {"dtype": torch.float32 if shape is None else torch.bfloat16, "device": device}


def submodels(
    shape: ModelShape | None,
    num_units: int,
    masked: float,
    device: torch.device,
    *,
    multiple: int = 1,
) -> Wave:
    """NUM_GROUPS sub-models of as many rows, each without a share `masked` of the units."""
    keep = torch.rand(NUM_GROUPS, num_units, generator=torch.Generator().manual_seed(0)) >= masked
    num_rows = 3 if shape is None else ROWS_PER_GROUP[device.type]
    return Wave.of(keep, [num_rows] * NUM_GROUPS, multiple=multiple, device=device)
