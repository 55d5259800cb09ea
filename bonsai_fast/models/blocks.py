"""The parts of a decoder that can be pruned: sub-layers, their units, and the weights of each unit.

A *part* is the smallest thing that owns rows or columns of a weight: a query head, a KV head, an
MLP channel, an expert. A *cut* says, for one dimension of one parameter, which part owns each
index. Slicing, counting and saving need nothing else, so fused and interleaved layouts are only
another `owner` table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from bonsai_fast.config.choices import ExpertUnit

SubLayer = Literal["attention", "mlp"]


@dataclass(frozen=True, eq=False)
class Cut:
    """One dimension of one parameter whose indices belong to parts.

    Attributes:
        parameter: name in `model.named_parameters()`.
        dim: 0 for the rows of an nn.Linear into the sub-layer (and its bias), 1 for the columns of
            the one out of it; other modules may store their weights otherwise.
        owner: int64 [size of that dimension], the part that owns each index.
    """

    parameter: str
    dim: int
    owner: torch.Tensor


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """One attention sub-layer. Its parts are the query heads 0..H-1, then the KV heads H..H+Hkv-1.

    Attributes:
        layer: index of the decoder layer.
        module: path of the attention module.
        output: path of the output projection; head masks act on its input.
        head_dim: width of one head at that input.
        kv_of_head: KV head that each query head reads, [H].
        cuts: the weights of each part.
        norms: paths of the norms that only this sub-layer uses; they are removed with it.
        whole: why its heads cannot be removed one by one, in a few words; None where they can. Such
            a sub-layer (an attention that normalises all heads together, a state-space mixer) has
            one head as wide as its output projection and no cuts.
        returns: length of the tuple that `module` returns, negative for a list; None: a tensor.
    """

    layer: int
    module: str
    output: str
    head_dim: int
    kv_of_head: tuple[int, ...]
    cuts: tuple[Cut, ...]
    norms: tuple[str, ...]
    whole: str | None = None
    returns: int | None = None

    @property
    def part_width(self) -> int:
        """Columns of the output projection that one query head feeds."""
        return self.head_dim

    @property
    def num_parts(self) -> int:
        return self.num_heads + self.num_kv_heads

    @property
    def num_heads(self) -> int:
        return len(self.kv_of_head)

    @property
    def num_kv_heads(self) -> int:
        return max(self.kv_of_head) + 1

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module,)

    def kept_parts(self, keep_heads: torch.Tensor) -> torch.Tensor:
        """Kept heads, bool [H] -> kept parts, bool [H + Hkv]: a KV head stays while a head does."""
        keep_kv = torch.zeros(self.num_kv_heads, dtype=torch.bool)
        keep_kv[torch.tensor(self.kv_of_head)[keep_heads]] = True
        return torch.cat([keep_heads, keep_kv])


@dataclass(frozen=True, eq=False)
class MLPBlock:
    """One MLP sub-layer. Its parts are the channels 0..I-1.

    Attributes:
        layer: index of the decoder layer.
        modules: paths of the modules that hold its parameters (OPT keeps them beside the attention
            module).
        output: path of the output projection; channel masks act on its input.
        num_channels: intermediate size I.
        cuts: the weights of each channel.
        norms: paths of the norms that only this sub-layer uses; they are removed with it.
        whole: why its channels cannot be removed one by one, in a few words; None where they can.
            Such a sub-layer has no cuts.
        returns: length of the tuple that its module returns, negative for a list; None: a tensor.
    """

    layer: int
    modules: tuple[str, ...]
    output: str
    num_channels: int
    cuts: tuple[Cut, ...]
    norms: tuple[str, ...]
    whole: str | None = None
    returns: int | None = None

    @property
    def part_width(self) -> int:
        """Columns of the output projection that one channel feeds."""
        return 1

    @property
    def num_parts(self) -> int:
        return self.num_channels

    def kept_parts(self, keep_channels: torch.Tensor) -> torch.Tensor:
        """bool [I] -> bool [I]; a channel is its own part."""
        return keep_channels


@dataclass(frozen=True, eq=False)
class ExpertsBlock:
    """One mixture of experts. Its parts are the experts 0..E-1, or the channels 0..I-1 inside them.

    A removed expert is one that the router cannot choose: its logit is -inf, and the router chooses
    among the others as if it had never been there. A mixture that keeps fewer than `fewest` experts
    is removed as a whole, with its shared experts (those that every token passes).

    A channel is removed from all experts of the mixture at once.

    Attributes:
        layer: index of the decoder layer.
        module: path of the module that holds the router, the experts and shared experts.
        router: path of the router inside `module`.
        experts: path of the module that holds the experts' weights, inside `module`.
        num_experts: E.
        num_channels: intermediate size I of an expert.
        transposed: whether an expert's part of the output projections is [I, D], not [D, I].
        top_k: how many experts a token passes.
        fewest_experts: experts that the router needs to work at all, mostly 1.
        by_expert: the weights of each expert, along the dimension that counts experts.
        by_channel: the weights of each channel.
        buffers: like `by_expert`, for buffers such as the bias that only corrects the choice.
        norms: paths of the norms that only this sub-layer uses; they are removed with it.
        experts_refused, channels_refused: why experts, or channels, cannot be removed one by one,
            in a few words; None where they can.
        unit: what its parts are.
        returns: length of the tuple that `module` returns, negative for a list; None: a tensor.
    """

    layer: int
    module: str
    router: str
    experts: str
    num_experts: int
    num_channels: int
    transposed: bool
    top_k: int
    fewest_experts: int
    by_expert: tuple[Cut, ...]
    by_channel: tuple[Cut, ...]
    buffers: tuple[Cut, ...]
    norms: tuple[str, ...]
    experts_refused: str | None = None
    channels_refused: str | None = None
    unit: ExpertUnit = "expert"
    returns: int | None = None

    @property
    def whole(self) -> str | None:
        """Why its parts cannot be removed one by one; None where they can."""
        return self.experts_refused if self.unit == "expert" else self.channels_refused

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The weights of each part; none if its parts cannot be removed one by one."""
        if self.whole is not None:
            return ()
        return self.by_expert if self.unit == "expert" else self.by_channel

    @property
    def fewest(self) -> int:
        """With fewer parts than this, the sub-layer is removed as a whole."""
        return self.fewest_experts if self.unit == "expert" else 1

    @property
    def output(self) -> str:
        """Name of the output projections of all experts, one 3-D parameter and not a module.

        Methods see it as one projection with E * I input columns, those of an expert side by side.
        """
        return f"{self.experts}.down_proj"

    @property
    def part_width(self) -> int:
        """Columns of the output projections that one part feeds."""
        return self.num_channels if self.unit == "expert" else self.num_experts

    @property
    def num_parts(self) -> int:
        return self.num_experts if self.unit == "expert" else self.num_channels

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module,)

    def kept_parts(self, keep_parts: torch.Tensor) -> torch.Tensor:
        """bool [E] -> bool [E], or [I] -> [I]; an expert or channel is its own part."""
        return keep_parts


Block = AttentionBlock | MLPBlock | ExpertsBlock


@dataclass(frozen=True, eq=False)
class Decoder:
    """The prunable decoder of one loaded model.

    Attributes:
        model_type: `config.model_type` of the model.
        path: path of the `ModuleList` of decoder layers.
        num_layers: its length.
        attention, mlp: the sub-layers that exist, by layer; one that was removed before is absent.
        refused: kinds of units that cannot be removed anywhere, with the reason.
        experts: the sub-layers that are mixtures of experts, by layer.
    """

    model_type: str
    path: str
    num_layers: int
    attention: dict[int, AttentionBlock]
    mlp: dict[int, MLPBlock]
    refused: Mapping[str, str] = field(default_factory=dict)
    experts: dict[int, ExpertsBlock] = field(default_factory=dict)

    def blocks(self) -> list[Block]:
        """All sub-layers, in the order of their units in a layout."""
        found: list[Block] = []
        for layer in range(self.num_layers):
            each = (self.attention.get(layer), self.mlp.get(layer), self.experts.get(layer))
            found += [block for block in each if block is not None]
        return found
