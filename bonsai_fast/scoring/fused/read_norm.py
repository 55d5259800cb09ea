"""Reads what a norm computes by trying its class, so that a name decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bonsai_fast.scoring.fused.parent import Norm, UnsupportedStructureError

EPS_NAMES = ("variance_epsilon", "eps")
# what `hub` puts in the place of a norm that was removed with its sub-layer
REMOVED = "RemovedNorm"
# every norm must divide this by its deviation or its root mean square, which differ
PROBE = (3.0, -1.0, 2.0, 5.0, 0.5, -4.0, 1.0, 2.5)


class _Kind(NamedTuple):
    """Attributes as of `Norm`; eps is that of a class that does not take one, else None."""

    centred: bool
    adds_one: bool
    eps: float | None


def is_norm(module: nn.Module) -> bool:
    """Whether a module calls itself a norm, and was not removed."""
    name = type(module).__name__
    return name.endswith(("Norm", "Norm1P")) and name != REMOVED


def read_norm(module: nn.Module, name: str) -> Norm:
    """Describe a norm.

    Args:
        module: the norm.
        name: its name, for errors.
    Raises:
        UnsupportedStructureError: it is neither an RMS norm nor a layer norm.
    """
    kind = _kind(cast(Hashable, type(module)))
    eps = kind.eps
    if eps is None:
        eps = next((getattr(module, each) for each in EPS_NAMES if hasattr(module, each)), None)
    known = {"weight", "bias"} >= {parameter for parameter, _ in module.named_parameters()}
    if not isinstance(eps, float) or not known:
        raise UnsupportedStructureError(
            f"{name} is a {type(module).__name__}, not a plain RMS norm or layer norm"
        )
    weight, bias = (getattr(module, each, None) for each in ("weight", "bias"))
    if bias is not None and not kind.centred:
        raise UnsupportedStructureError(f"{name} is an RMS norm with a bias")
    return Norm(weight, eps, kind.adds_one, kind.centred, bias)


@cache
def _kind(norm: Any) -> _Kind:
    """What norms of this class compute, found by trying one."""
    unknown = UnsupportedStructureError(
        f"{norm.__name__} is not known to be an RMS norm or a layer norm"
    )
    try:
        probe = norm(len(PROBE))
    except (TypeError, AttributeError, ValueError) as error:
        raise unknown from error
    x = torch.tensor([PROBE])
    for centred in (False, True):
        for adds_one in (False, True):
            expected = _normalised(x, centred) * (2.0 if adds_one else 1.0)
            if torch.allclose(_tried(probe, x), expected, rtol=1e-3):
                has_eps = any(hasattr(probe, name) for name in EPS_NAMES)
                return _Kind(centred, adds_one, None if has_eps else _eps(probe, centred))
    raise unknown


def _normalised(x: Tensor, centred: bool) -> Tensor:
    wide = x.double()
    if centred:
        wide = wide - wide.mean()
    return (wide / wide.square().mean().sqrt()).float()


@torch.no_grad()
def _tried(probe: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The norm of x with all weights 1 and all biases 0."""
    assert isinstance(probe, nn.Module)
    for name, parameter in probe.named_parameters():
        parameter.fill_(0.0 if name == "bias" else 1.0)
    found: Tensor = probe(x)
    return found.float()


def _eps(probe: Callable[[Tensor], Tensor], centred: bool) -> float:
    """The eps of a norm that has it as a constant, from how it treats small numbers."""
    x = torch.tensor([PROBE]) * 1e-3
    exact = x.double() - x.double().mean() if centred else x.double()
    # y = x / sqrt(mean square + eps)
    squares = (exact / _tried(probe, x).double()).square() - exact.square().mean()
    return float(f"{float(squares.mean()):.2g}")
