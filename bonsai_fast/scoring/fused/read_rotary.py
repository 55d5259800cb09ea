"""Reads which rotary positions an attention module gives its heads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch import nn

from bonsai_fast.scoring.fused.parent import Rotary, UnsupportedStructureError

FUNCTION = "apply_rotary_pos_emb"
# attention classes that turn heads in some layers only and do not say so in `use_rope`
WINDOWS_ONLY = ("Cohere2Attention",)
NOT_IN_FULL_LAYERS = ("Exaone4Attention",)


def takes_kind(rotary: nn.Module) -> bool:
    """Whether a model's rotary module must be told the kind of a layer.

    Raises:
        UnsupportedStructureError: it must be told something else.
    """
    arguments = list(signature(rotary.forward).parameters)
    if arguments[:2] != ["x", "position_ids"] or arguments[2:] not in ([], ["layer_type"]):
        raise UnsupportedStructureError(
            f"{type(rotary).__name__} takes {', '.join(arguments)}; expected x and position_ids"
        )
    return len(arguments) > 2


def read_rotary(module: nn.Module, name: str, kind: str) -> Rotary | None:
    """Rotary positions of an attention module; None: it has none.

    Args:
        module: the attention.
        name: its name, for errors.
        kind: of its layer's angles.
    Raises:
        UnsupportedStructureError: its class turns heads in another way.
    """
    if not _turns(module):
        return None
    interleaved = _interleaved(cast(Hashable, type(module)))
    if interleaved is None:
        raise UnsupportedStructureError(f"{name} turns heads by positions in an unknown way")
    return Rotary(kind, interleaved)


def _turns(module: nn.Module) -> bool:
    if hasattr(module, "use_rope"):
        return bool(module.use_rope)
    names = {each.__name__ for each in type(module).__mro__}
    window = getattr(module, "sliding_window", None)
    if not names.isdisjoint(WINDOWS_ONLY):
        return window is not None
    if not names.isdisjoint(NOT_IN_FULL_LAYERS):
        return window is None or bool(getattr(module, "is_sliding", False))
    return True


def function_of(module_class: type, name: str) -> Callable[..., Any] | None:
    """A function of the file that defines a class of modules, or the class that it extends."""
    found = (getattr(sys.modules.get(each.__module__), name, None) for each in module_class.__mro__)
    return next((function for function in found if function is not None), None)


@cache
def _interleaved(attention: Any) -> bool | None:
    """Which columns of a head this class turns together, found by turning one by 90 degrees.

    Returns:
        True: 2i and 2i + 1; False: i and i + R / 2; None: others.
    """
    function = function_of(attention, FUNCTION)
    if function is None:
        return None
    head = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    try:
        turned = function(head, head, cos, sin)[0].flatten().tolist()
    except (TypeError, RuntimeError):
        return None
    return {(-2.0, 1.0, -4.0, 3.0): True, (-3.0, -4.0, 1.0, 2.0): False}.get(tuple(turned))
