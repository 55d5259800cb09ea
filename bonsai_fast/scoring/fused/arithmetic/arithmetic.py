"""Buffers, matrix products and norms of one call of the fused engine, as one object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast.scoring.fused.arithmetic.eight_bits import Weight
from bonsai_fast.scoring.fused.arithmetic.products import Multiply, Product, full
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.parent import Norm, Projection


class Arithmetic:
    """How a call of the engine computes, and the memory in which it does.

    Args:
        like: has the device and dtype of the model's weights.
        multiply: how matrix products are computed; see `products`.
        kernels: whether the project's ops and PyTorch's fused functions are used. On CUDA they are
            kernels; on a CPU they give the same results, more slowly.
    """

    def __init__(self, like: Tensor, *, multiply: Multiply = full, kernels: bool = False) -> None:
        self.kernels = kernels
        self._multiply = multiply
        self._workspace = Workspace(like)

    @property
    def in_8_bits(self) -> bool:
        """Whether matrix products are computed in 8 bits."""
        return self._multiply is not full

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor; it overwrites the tensor that had this name before."""
        return self._workspace(name, *shape, dtype=dtype)

    def multiply(self, a: Tensor, products: Sequence[Product]) -> None:
        """Compute a [M, K] times the weight [K, N] of each product, into its `out` [M, N]."""
        self._multiply(a, products, self._workspace)

    def project(
        self,
        inputs: Tensor,
        projections: Sequence[Projection],
        weights: Sequence[Weight],
        outs: Sequence[Tensor],
    ) -> None:
        """Apply several projections to the same inputs.

        Args:
            inputs: [R, T, D], contiguous.
            projections: their biases are added.
            weights: of these projections, transposed.
            outs: [R * T, columns] each, overwritten.
        """
        self.multiply(inputs.view(-1, inputs.shape[-1]), list(map(Product, weights, outs)))
        for projection, out in zip(projections, outs, strict=True):
            if projection.bias is not None:
                out.add_(projection.bias)

    def normalize(self, norm: Norm | None, states: Tensor, name: str = "normed") -> Tensor:
        """RMS norm or layer norm of the last dimension, computed in float32.

        Args:
            norm: its factors; None: the states are returned as they are.
            states: [..., D].
            name: of the buffer that holds the result. With kernels, and of a layer norm, the result
                is a new tensor.
        """
        if norm is None:
            return states
        if norm.centred:
            weight = norm.weight + 1.0 if norm.adds_one and norm.weight is not None else norm.weight
            return F.layer_norm(states, states.shape[-1:], weight, norm.bias, norm.eps)
        if self.kernels and not norm.adds_one:
            return F.rms_norm(states, states.shape[-1:], norm.weight, norm.eps)
        out = self.buffer(name, *states.shape)
        wide = self.buffer("float32", *states.shape, dtype=torch.float32)
        wide.copy_(states)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse.div_(states.shape[-1]).add_(norm.eps).rsqrt_()
        wide.mul_(inverse)
        if norm.weight is not None:
            wide.mul_(1.0 + norm.weight.float() if norm.adds_one else norm.weight.float())
        return out.copy_(wide)
