"""Reads what an MLP computes from its module."""

from __future__ import annotations

from bonsai_fast.models import MLPBlock
from bonsai_fast.scoring.fused.activations import kernel_name
from bonsai_fast.scoring.fused.layer_modules import LayerModules
from bonsai_fast.scoring.fused.parent import MLP, Norm, UnsupportedStructureError
from bonsai_fast.scoring.fused.read_attention import split_rows

ACTIVATION_NAMES = ("act_fn", "activation_fn")


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
    if hasattr(module, "gate_up_proj"):
        gate_up = modules.linear(f"{name}.gate_up_proj")
        gate, up = split_rows(gate_up, (block.num_channels, block.num_channels))
    elif hasattr(module, "gate_proj"):
        gate, up = (modules.linear(f"{name}.{part}_proj") for part in ("gate", "up"))
    else:
        raise UnsupportedStructureError(f"{modules.path}.{name} is not a gated MLP")
    activation = next(
        (getattr(module, part) for part in ACTIVATION_NAMES if hasattr(module, part)), None
    )
    if activation is None:
        raise UnsupportedStructureError(f"{modules.path}.{name} has none of {ACTIVATION_NAMES}")
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
