"""2:4 weights on hardware that multiplies them: two of four neighbours in a row are zero.

PyTorch has two backends, both for CUDA alone: CUTLASS (compute capability 8.x) and cuSPARSELt.
Which of them a machine runs is found by trying.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

BACKENDS: dict[str, Any] = {
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": SparseSemiStructuredTensorCUTLASS,
}
# (out, in) of the product that is tried, and its rows
_TRIED = (128, 128)
_TRIED_ROWS = 64


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether of every four neighbours in a row, [out, in], two at least are zero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    groups = weight.detach().reshape(-1, 4)
    return bool(((groups != 0).sum(dim=1) <= 2).all())


def two_of_four_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers whose weights are 2:4."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_two_of_four(module.weight)
    ]


@functools.cache
def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend does not run here; None if it does and its product is right.

    Args:
        backend: "cutlass" or "cusparselt".
        device, dtype: of the weights.
    """
    if device.type != "cuda":
        return f"no 2:4 kernels on {device.type}"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_TRIED, generator=generator).to(device, dtype)
    weight.view(-1, 4)[:, 2:] = 0
    x = torch.randn(_TRIED_ROWS, _TRIED[1], generator=generator).to(device, dtype)
    try:
        product = nn.functional.linear(x, _compress(weight, backend))
    except (RuntimeError, NotImplementedError) as error:
        return " ".join(str(error).split())
    if not torch.allclose(product.float(), x.float() @ weight.float().T, rtol=0.05, atol=0.5):
        return "its product is wrong"
    return None


def use_semi_structured(model: nn.Module, backend: str) -> int:
    """Store a model's 2:4 weights compressed, in place, so that products use the 2:4 kernels.

    Args:
        model: on CUDA, in float16 or bfloat16.
        backend: "cutlass" or "cusparselt".
    Returns:
        how many weights were compressed.
    Raises:
        ValueError: the backend does not run here or cannot take a weight's shape, or nothing in the
            model is 2:4.
    """
    names = two_of_four_linears(model)
    if not names:
        raise ValueError("2:4 kernels were asked for, but no linear layer's weight is 2:4")
    like = model.get_submodule(names[0]).weight
    assert isinstance(like, torch.Tensor)
    if (reason := why_not(backend, like.device, like.dtype)) is not None:
        raise ValueError(f"{backend}: {reason}")
    for name in names:
        module = model.get_submodule(name)
        weight = module.get_parameter("weight")
        try:
            compressed = _compress(weight.detach(), backend)
        except RuntimeError as error:
            raise ValueError(f"{backend} does not support {name}: {error}") from error
        module.weight = nn.Parameter(compressed, requires_grad=False)
    return len(names)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are stored; tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    total = 0
    for tensor in tensors.values():
        parts = [getattr(tensor, name, None) for name in ("packed", "meta")]
        total += sum(part.nbytes for part in parts if part is not None) or tensor.nbytes
    return total


def _compress(weight: torch.Tensor, backend: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructured")
        compressed: torch.Tensor = BACKENDS[backend].from_dense(weight)
    return compressed
