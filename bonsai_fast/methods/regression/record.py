"""Regressions of rounds on disk, one safetensors file each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bonsai_fast.files import write_atomically
from bonsai_fast.methods.regression.estimate import Regression


@dataclass(frozen=True, eq=False)
class RecordedRegression:
    """A recorded regression.

    Attributes:
        quantity: name of the utilities, with their unit.
        utility: float64 [S], measured; not finite where a sub-model was left out.
        held_out: float64 [S], predicted from other sub-models; see `Regression`.
        relevance, standard_error: float64 [P].
        kendall_tau, r2: of the held-out predictions.
        num_rows, num_dropped: sub-models used and left out.
    """

    quantity: str
    utility: torch.Tensor
    held_out: torch.Tensor
    relevance: torch.Tensor
    standard_error: torch.Tensor
    kendall_tau: float
    r2: float
    num_rows: int
    num_dropped: int


TENSORS = ("utility", "held_out", "relevance", "standard_error")
NUMBERS = ("kendall_tau", "r2", "num_rows", "num_dropped")


def save_regression(
    path: Path, regression: Regression, utility: torch.Tensor, quantity: str
) -> None:
    """Write a regression and the utilities, float [S], that it was fitted to.

    Raises:
        OSError: the file cannot be written; nothing is left half-written.
    """
    tensors = {name: getattr(regression, name) for name in TENSORS if name != "utility"}
    tensors["utility"] = utility.double()
    about = {"quantity": quantity, **{name: getattr(regression, name) for name in NUMBERS}}
    # one entry, because safetensors shuffles several: the same regression is the same bytes
    metadata = {"regression": json.dumps(about, sort_keys=True)}
    content = {name: tensors[name].contiguous() for name in TENSORS}
    write_atomically(path, save(content, metadata))


def load_regression(path: Path) -> RecordedRegression:
    """Read it again.

    Raises:
        ValueError: not a regression of this project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["regression"])
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        numbers = {name: about[name] for name in NUMBERS}
        return RecordedRegression(quantity=about["quantity"], **tensors, **numbers)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path}: expected a regression written by bonsai_fast: {error}"
        ) from error
