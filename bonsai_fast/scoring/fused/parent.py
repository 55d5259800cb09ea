"""What a decoder computes, described by its weights.

    x = x + r post_norm(attention(norm(x)));  x = x + r post_norm(mlp(norm(x)))

Norms may be absent, and in a parallel layer both read the same x. LLaMA, Mistral, Qwen, Phi-3,
Gemma 1 to 3, Granite, SmolLM3, OLMo, Cohere, and pruned models of these families are such decoders.
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
    """RMS norm or layer norm over the last dimension.

    Attributes:
        weight: [D]; None: all factors are 1.
        eps: added to the mean square.
        adds_one: the factor is 1 + weight in float32, as in Gemma; otherwise it is the weight.
        centred: the mean is subtracted first, as in a layer norm.
        bias: [D], added last; None: nothing is.
    """

    weight: Tensor | None
    eps: float
    adds_one: bool = False
    centred: bool = False
    bias: Tensor | None = None


@dataclass(frozen=True)
class Rotary:
    """Which rotary positions the heads of an attention get.

    Attributes:
        kind: names the angles where layers have different ones, as in Gemma 3; "" if all have the
            same.
        interleaved: columns 2i and 2i + 1 are a pair, as in Cohere; otherwise i and i + R / 2 are.
    """

    kind: str
    interleaved: bool


@dataclass(frozen=True)
class QueryGrowth:
    """Queries are multiplied by 1 + beta * log(1 + floor(position / length)), as in Ministral 3."""

    beta: float
    length: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention:
    """One attention sub-layer.

    Attributes:
        block: its units.
        norm: applied to its input; None: it reads the residual stream as it is.
        post_norm: applied to its output before that is added; None: nothing is.
        residual_factor: of what is added.
        query, key, value, output: projections; heads are rows of query and columns of output.
        head_dim: columns of a head.
        kv_of_head: the KV head that each query head reads.
        query_norm, key_norm: of each head, or of all heads together; None: there are none.
        norms_all_heads: whether they are of all heads together.
        norms_last: whether they come after the rotary positions.
        scale: factor of the attention scores.
        softcap: scores are softcap * tanh(scores / softcap); None: they have no bound.
        window: number of tokens that a token attends to, including itself; None: all before it.
        rotary: None: positions are not encoded.
        query_growth: None: queries are not multiplied by what depends on their position.
    """

    block: AttentionBlock
    norm: Norm | None
    post_norm: Norm | None
    residual_factor: float
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    head_dim: int
    kv_of_head: tuple[int, ...]
    query_norm: Norm | None
    key_norm: Norm | None
    norms_all_heads: bool
    norms_last: bool
    scale: float
    softcap: float | None
    window: int | None
    rotary: Rotary | None
    query_growth: QueryGrowth | None

    @property
    def num_parts(self) -> int:
        """Number of parts that masks name: query heads, or 1 if they cannot be removed alone."""
        return self.block.num_heads


@dataclass(frozen=True, eq=False, kw_only=True)
class MLP:
    """One MLP: output(activation(gate(x)) * up(x)), or output(activation(up(x))) without a gate.

    Attributes:
        block: its units.
        norm, post_norm, residual_factor, output: as of `Attention`.
        gate: None: there is no gate.
        activation_name: the name that ops have for the activation; None if they do not have it.
    """

    block: MLPBlock
    norm: Norm | None
    post_norm: Norm | None
    residual_factor: float
    gate: Projection | None
    up: Projection
    output: Projection
    activation: Callable[[Tensor], Tensor]
    activation_name: str | None

    @property
    def num_parts(self) -> int:
        """Number of channels."""
        return self.block.num_channels

    @property
    def inputs(self) -> dict[str, Projection]:
        """The projections whose rows are channels, by name: gate if there is one, then up."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return {**gate, "up": self.up}


@dataclass(frozen=True, eq=False)
class Removed:
    """A sub-layer that was pruned away before.

    Attributes:
        bias: of its output projection, if it had one.
        post_norm, residual_factor: as of `Attention`.
    """

    bias: Tensor | None
    post_norm: Norm | None = None
    residual_factor: float = 1.0


SubLayer = Attention | MLP | Removed


@dataclass(frozen=True, eq=False, kw_only=True)
class Structure:
    """A whole decoder.

    Attributes:
        embedding, rotary: the model's own modules.
        embedding_factor: of the embedded tokens.
        rotary_kinds: whether `rotary` must be told the kind of its angles; see `Rotary`.
        sublayers: attention of layer 0, MLP of layer 0, attention of layer 1, ... Those of a
            streamed model are valid until a sub-layer of another layer is read.
        blocks: the units of every sub-layer; None for one that was removed.
        parallel: whether each MLP reads what its layer's attention reads.
        capped: whether any attention has a softcap.
        norm: after the last layer.
        like: a weight outside the layers; has the device and dtype of the model.
    """

    embedding: nn.Module
    embedding_factor: float
    rotary: nn.Module
    rotary_kinds: bool
    sublayers: Sequence[SubLayer]
    blocks: list[Block | None]
    parallel: bool
    capped: bool
    norm: Norm
    like: Tensor
