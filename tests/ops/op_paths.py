"""Both implementations of an op, as functions of the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch._library.custom_ops import CustomOpDef


def kernel_of(op: CustomOpDef) -> Callable[..., Any]:
    """What CUDA tensors get: checks, result and Triton kernel. Interpreted without a GPU."""
    return op._backend_fns["cuda"]


def both(op: CustomOpDef) -> list[Any]:
    """The kernel and the op itself, which runs the CPU path on CPU tensors."""
    return [pytest.param(kernel_of(op), id="kernel"), pytest.param(op, id="op")]


def refusals(op: CustomOpDef, right: dict[str, Any], wrong: list[Any]) -> Callable[..., None]:
    """A test that kernel and op refuse wrong arguments with the right message.

    Args:
        right: arguments that the op accepts.
        wrong: pytest.param(changes to `right`, pattern of the message) for each mistake.
    """

    @pytest.mark.parametrize("function", both(op))
    @pytest.mark.parametrize("wrong, message", wrong)
    def test(wrong: dict[str, Any], message: str, function: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match=message):
            function(**(right | wrong))

    return test
