"""Reads what an MLP computes from its module."""

from __future__ import annotations

from torch import nn

from bonsai_fast.models import MLPBlock
from bonsai_fast.scoring.fused.activations import kernel_name
from bonsai_fast.scoring.fused.layer_modules import LayerModules
from bonsai_fast.scoring.fused.parent import (
    MLP,
    Norm,
    Projection,
    UnsupportedStructureError,
)
from bonsai_fast.scoring.fused.read_attention import split_rows

ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


def read_mlp(
    modules: LayerModules,
    block: MLPBlock,
    *,
    norm: Norm | None,
    post_norm: Norm | None,
    residual_factor: float,
) -> MLP:
    """Describe an MLP.

    Args:
        modules: of its layer.
        block: its units.
        norm, post_norm, residual_factor: see `Attention`.
    Raises:
        UnsupportedStructureError: something in it is unknown.
    """
    output = modules.inside(block.output)
    name = output.rpartition(".")[0]
    module = modules.layer.get_submodule(name)
    gate, up = _inputs(modules, name, block)
    activation_name = next((part for part in ACTIVATION_NAMES if hasattr(module, part)), None)
    if activation_name is None:
        raise UnsupportedStructureError(f"{modules.path}.{name} has none of {ACTIVATION_NAMES}")
    activation = getattr(module, activation_name)
    if isinstance(activation, nn.Module):
        activation = modules.whole(f"{name}.{activation_name}")
    return MLP(
        block=block,
        norm=norm,
        post_norm=post_norm,
        residual_factor=residual_factor,
        gate=gate,
        up=up,
        output=modules.linear(output),
        activation=activation,
        activation_name=kernel_name(activation),
    )


def _inputs(
    modules: LayerModules, name: str, block: MLPBlock
) -> tuple[Projection | None, Projection]:
    """Gate, if there is one, and up: separate, fused, or up alone."""
    module = modules.layer.get_submodule(name)
    output = modules.layer.get_submodule(modules.inside(block.output))
    names = {
        child: part
        for child, part in module.named_children()
        if isinstance(part, nn.Linear) and part is not output
    }
    if not names:
        raise UnsupportedStructureError(f"{modules.path}.{name} has no input projections")
    if set(names) == {"gate_proj", "up_proj"}:
        return modules.linear(f"{name}.gate_proj"), modules.linear(f"{name}.up_proj")
    if len(names) > 1:
        raise UnsupportedStructureError(
            f"{modules.path}.{name}: expected gate_proj and up_proj, found {', '.join(names)}"
        )
    ((only, part),) = names.items()
    found = modules.linear(f"{name}.{only}")
    if part.out_features == 2 * block.num_channels:
        gate, up = split_rows(found, (block.num_channels, block.num_channels))
        return gate, up
    return None, found
