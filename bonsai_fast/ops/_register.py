"""Register an op with PyTorch from one generator function.

The function checks its arguments, yields its result unfilled, and then fills it in plain PyTorch:

    @register()
    def double(x: Tensor) -> Iterator[Tensor]:
        check_floats("x", x, "T", "H")
        out = x.new_empty(x.shape)
        yield out
        out.copy_(2 * x)

Three implementations come from it:

    tracing (fake tensors)  up to the yield
    CUDA                    up to the yield, then `double_triton(x=x, out=out)` from the file of the
                            same name in kernels/
    any other device        the whole function

An op that overwrites one of its arguments yields None and names that argument in `mutates`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

Steps = Callable[..., Iterator[Any]]


def register(*, mutates: Sequence[str] = ()) -> Callable[[Steps], CustomOpDef]:
    """Make the decorated generator function an op, `torch.ops.bonsai_fast.<its name>`.

    Args:
        mutates: the arguments that the op overwrites.
    """

    def decorate(steps: Steps) -> CustomOpDef:
        def compute(*args: Any, **kwargs: Any) -> Any:
            run = steps(*args, **kwargs)
            result = next(run)
            next(run, None)
            return result

        signature = inspect.signature(steps, eval_str=True)
        (result,) = get_args(signature.return_annotation)
        compute.__name__, compute.__doc__ = steps.__name__, steps.__doc__
        compute.__signature__ = signature.replace(  # type: ignore[attr-defined]
            return_annotation=None if result is type(None) else result
        )
        op = torch.library.custom_op(
            f"bonsai_fast::{steps.__name__}", compute, mutates_args=tuple(mutates)
        )
        op.register_fake(lambda *args, **kwargs: next(steps(*args, **kwargs)))
        op.register_kernel("cuda")(_cuda(steps, signature))
        op.__doc__ = steps.__doc__
        return op

    return decorate


def _cuda(steps: Steps, signature: inspect.Signature) -> Callable[..., Any]:
    """The CUDA implementation: checks and result from `steps`, the rest from a Triton kernel."""
    names = list(signature.parameters)
    # PyTorch leaves out arguments that are equal to their defaults.
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }

    @functools.cache
    def launcher() -> Callable[..., None]:
        # Imported on first use: an install without Triton works on the CPU.
        file = steps.__module__.rpartition(".")[2]
        module = importlib.import_module(f"bonsai_fast.kernels.{file}")
        found: Callable[..., None] = getattr(module, f"{steps.__name__}_triton")
        return found

    def launch(*args: Any, **kwargs: Any) -> Any:
        result = next(steps(*args, **kwargs))
        if isinstance(result, Tensor) and result.numel() == 0:
            return result
        arguments = defaults | dict(zip(names, args, strict=False)) | kwargs
        if result is not None:
            arguments["out"] = result
        with torch.cuda.device_of(arguments[names[0]]):
            launcher()(**arguments)
        return result

    return launch
