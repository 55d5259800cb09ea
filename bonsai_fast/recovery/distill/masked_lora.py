"""Low-rank adapters whose update leaves a sparse layer's zeros alone. Needs peft."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from bonsai_fast.recovery.distill.lora_adapters import ADAPTER


class MaskedLoraLinear(Linear):
    """Computes x (W + scale * (W != 0) * B A)', which is what merging gives.

    An adapter beside the weights could use the products with all of B A; a merge that keeps the
    zeros would then take away a part of what was trained. There is no dropout: it would act on the
    weight, too.
    """

    def __init__(self, base_layer: nn.Linear, adapter_name: str, **keywords: Any) -> None:
        super().__init__(base_layer, adapter_name, **keywords)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the weight, [out, in]: zero where the weight is."""
        update: Tensor = super().get_delta_weight(adapter)
        return update * (self.get_base_layer().weight != 0)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        base = self.get_base_layer()
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        arguments: Any = (x.to(dtype), base.weight, base.bias, a, b, self.scaling[ADAPTER])
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = _MaskedUpdate.apply(*arguments)  # type: ignore[no-untyped-call]
        return out


class _MaskedUpdate(torch.autograd.Function):
    """One product with the merged weight, which is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """x [..., in], weight [out, in], a [r, in], b [out, r] -> [..., out]."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        merged = _merged(weight, a, b, scale).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b."""
        x, weight, a, b = ctx.saved_tensors
        (of_out,) = outputs
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_out @ _merged(weight, a, b, ctx.scale).to(of_out.dtype)
        of_merged = of_out.flatten(0, -2).T @ x.flatten(0, -2)
        of_update = of_merged.to(a.dtype).mul_(weight != 0).mul_(ctx.scale)
        return of_x, None, None, b.T @ of_update, of_update @ a.T, None


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.where(weight != 0, weight.to(a.dtype) + scale * (b @ a), 0)
