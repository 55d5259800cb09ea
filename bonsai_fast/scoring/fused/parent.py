"""What a LLaMA-like decoder computes, described by its weights.

    x = x + attention(norm(x));  x = x + mlp(norm(x))

with RMS norms, rotary positions, grouped K and V and a gated MLP: LLaMA, Mistral, Qwen2, Qwen3,
Phi-3, Gemma, and pruned models of these families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bonsai_fast.models import AttentionBlock, Block, MLPBlock


class UnsupportedStructureError(ValueError):
    """The model is not such a decoder; the message says what differs."""


@dataclass(frozen=True, eq=False)
class Projection:
    """y = x W^T + b.

    Attributes:
        weight: [out, in]; may be a view of some rows of a fused projection.
        bias: [out] or None.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def bias_or_zeros(self) -> Tensor:
        """[out]."""
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS norm over the last dimension.

    Attributes:
        weight: [D].
        eps: added to the mean square.
        adds_one: the factor is 1 + weight in float32, as in Gemma; otherwise it is the weight.
    """

    weight: Tensor
    eps: float
    adds_one: bool


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention sub-layer.

    Attributes:
        block: its units.
        norm: applied to its input.
        query, key, value, output: projections; heads are rows of query and columns of output.
        query_norm, key_norm: applied to each head, or None.
        scale: factor of the attention scores.
        window: number of tokens that a token attends to, including itself; None: all before it.
    """

    block: AttentionBlock
    norm: Norm
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    query_norm: Norm | None
    key_norm: Norm | None
    scale: float
    window: int | None

    @property
    def num_parts(self) -> int:
        """Number of query heads."""
        return self.block.num_heads


@dataclass(frozen=True, eq=False)
class MLP:
    """One gated MLP: output(activation(gate(x)) * up(x)).

    Attributes:
        activation_name: the name that ops have for the activation; None if they do not have it.
    """

    block: MLPBlock
    norm: Norm
    gate: Projection
    up: Projection
    output: Projection
    activation: Callable[[Tensor], Tensor]
    activation_name: str | None

    @property
    def num_parts(self) -> int:
        """Number of channels."""
        return self.block.num_channels


@dataclass(frozen=True, eq=False)
class Removed:
    """A sub-layer that was pruned away before: only its output bias is left, if it had one."""

    bias: Tensor | None


SubLayer = Attention | MLP | Removed


@dataclass(frozen=True, eq=False)
class Structure:
    """A whole decoder.

    Attributes:
        embedding, rotary: the model's own modules.
        sublayers: attention of layer 0, MLP of layer 0, attention of layer 1, ... Those of a
            streamed model are valid until a sub-layer of another layer is read.
        blocks: the units of every sub-layer; None for one that was removed.
        norm: after the last layer.
    """

    embedding: nn.Module
    rotary: nn.Module
    sublayers: Sequence[SubLayer]
    blocks: list[Block | None]
    norm: Norm
