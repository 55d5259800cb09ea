"""What can be removed from a model: its units, in a fixed order, each with its parameter count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from bonsai_fast.config.choices import AttentionUnit, ExpertUnit
from bonsai_fast.models import AttentionBlock, Block, Decoder, ExpertsBlock, find_decoder

Kind = Literal[AttentionUnit, "channel", "expert", "attention", "mlp"]
# kinds whose units are parts of an attention sub-layer, or a whole one
ATTENTION: tuple[Kind, ...] = ("head", "kv-group", "attention")


@dataclass(frozen=True, slots=True)
class Unit:
    """One removable unit.

    Attributes:
        layer: index of its decoder layer.
        kind: "head", "kv-group", "channel", "expert", "attention" or "mlp".
        index: its number among the units of that kind in that layer; for a head its query head, for
            a KV group its KV head.
        num_parameters: parameters that go with it when the rest of its sub-layer stays.
    """

    layer: int
    kind: Kind
    index: int
    num_parameters: int


@dataclass(frozen=True, eq=False)
class Group:
    """The units of one kind in one layer: positions start..stop-1 of the layout.

    `part_of_unit` gives, for each part of the block (query head, channel or expert), the unit of
    this group that it belongs to.
    """

    layer: int
    kind: Kind
    start: int
    stop: int
    num_parameters: int  # of each unit
    block: Block
    part_of_unit: torch.Tensor  # int64 [query heads, channels or experts]

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def is_parts(self) -> bool:
        """Whether the units are the block's parts, one by one."""
        return torch.equal(self.part_of_unit, torch.arange(len(self)))

    def mean_over_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Averages over the columns of the output projection that each unit owns.

        Args:
            columns: float [in_features] of the block's output projection; [E * I] of a mixture.
        Returns:
            float64 [units of this group].
        """
        columns = columns.double()
        if isinstance(self.block, ExpertsBlock) and self.block.unit == "channel":
            columns = columns.view(self.block.num_experts, -1).T.reshape(-1)
        per_part = columns.view(len(self.part_of_unit), -1).mean(dim=1)
        totals = torch.zeros(len(self), dtype=torch.float64)
        totals.index_add_(0, self.part_of_unit, per_part)
        return totals / torch.bincount(self.part_of_unit, minlength=len(self))


class Layout(Sequence[Unit]):
    """The P units of a model, ordered by (layer, kind, index).

    Build one with `Layout.of(model)`. `len(layout) == P`; `layout.units[i]` is a `Unit`;
    `layout.groups` holds the same units as contiguous ranges, one a (layer, kind).
    """

    def __init__(
        self,
        decoder: Decoder,
        sizes: dict[str, int],
        *,
        attention: AttentionUnit,
        experts: ExpertUnit,
        sublayers: bool,
    ) -> None:
        mixtures = {n: replace(block, unit=experts) for n, block in decoder.experts.items()}
        self.decoder = replace(decoder, experts=mixtures)
        self.attention = attention
        self.experts = experts
        self.sublayers = sublayers
        self._sizes = sizes  # parameters of the model by name
        self.groups = tuple(self._groups())
        self.num_units = self.groups[-1].stop if self.groups else 0
        self._groups_of_block: dict[int, list[Group]] = {}
        for group in self.groups:
            self._groups_of_block.setdefault(id(group.block), []).append(group)
        self.num_parameters_per_unit = torch.cat(
            [torch.full((len(group),), group.num_parameters) for group in self.groups]
            or [torch.zeros(0, dtype=torch.int64)]
        )

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        attention: AttentionUnit = "head",
        experts: ExpertUnit = "expert",
        sublayers: bool = False,
    ) -> Layout:
        """Find the units of a loaded model.

        Args:
            model: a causal language model, dense or pruned before.
            attention: "head" removes query heads one by one, and a KV head with its last one;
                "kv-group" removes a KV head with all its query heads. Both are the same where every
                query head has its own KV head.
            experts: of a mixture of experts: "expert" removes whole ones, "channel" the same
                channels of all experts of a layer.
            sublayers: also list whole attention and MLP sub-layers as units.
        Raises:
            ValueError: the model is not supported, or an argument is not one of the above.
        """
        if attention not in get_args(AttentionUnit):
            raise ValueError(
                f"attention: expected one of {get_args(AttentionUnit)}, got {attention!r}"
            )
        if experts not in get_args(ExpertUnit):
            raise ValueError(f"experts: expected one of {get_args(ExpertUnit)}, got {experts!r}")
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        return cls(
            find_decoder(model), sizes, attention=attention, experts=experts, sublayers=sublayers
        )

    # Sequence -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.num_units

    def __getitem__(self, position):  # type: ignore[no-untyped-def]
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"unit {position} of a layout with {len(self)} units")
        position %= len(self)
        group = next(group for group in self.groups if position < group.stop)
        return Unit(group.layer, group.kind, position - group.start, group.num_parameters)

    def __iter__(self) -> Iterator[Unit]:
        for group in self.groups:
            for index in range(len(group)):
                yield Unit(group.layer, group.kind, index, group.num_parameters)

    @property
    def units(self) -> Layout:
        """The units themselves; a layout is the sequence of its units."""
        return self

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of units in this layout, in their order within a layer."""
        present = {group.kind for group in self.groups}
        return tuple(kind for kind in get_args(Kind) if kind in present)

    @property
    def refused(self) -> Mapping[str, str]:
        """Kinds of units that this model cannot lose one by one, each with the reason."""
        return self.decoder.refused

    @property
    def has_mixtures(self) -> bool:
        """Whether some units are experts, or channels inside them."""
        return any(isinstance(group.block, ExpertsBlock) for group in self.groups)

    @property
    def num_by_kind(self) -> dict[Kind, int]:
        """Number of units of each kind that occurs."""
        return {
            kind: sum(len(group) for group in self.groups if group.kind == kind)
            for kind in self.kinds
        }

    def __repr__(self) -> str:
        units = ", ".join(f"{count:,} {kind}" for kind, count in self.num_by_kind.items())
        return (
            f"Layout({self.decoder.model_type}, {self.decoder.num_layers} layers, units: "
            f"{units or 'none'}; {self.num_decoder_parameters:,} of "
            f"{self.num_model_parameters:,} parameters in the decoder)"
        )

    # Masks ----------------------------------------------------------------------------------------

    def check_mask(self, keep: torch.Tensor, *, dims: int) -> None:
        """Raise ValueError or TypeError unless `keep` is a bool mask with `dims` dimensions."""
        if keep.dtype != torch.bool:
            raise TypeError(f"keep mask: expected dtype bool (True = kept), got {keep.dtype}")
        if keep.dim() != dims or keep.shape[-1] != len(self):
            shape = "[P]" if dims == 1 else "[S, P]"
            raise ValueError(
                f"keep mask: expected shape {shape} with P = {len(self)} units, "
                f"got {tuple(keep.shape)}"
            )

    def keep_by_block(self, keep: torch.Tensor) -> list[tuple[Block, torch.Tensor]]:
        """Masks over units -> masks over the query heads, channels or experts of each sub-layer.

        Args:
            keep: bool [..., P].
        Returns:
            for each sub-layer, in order, bool [..., H], [..., I] or [..., E]; may share memory with
            `keep`.
        """
        blocks = {id(group.block): group.block for group in self.groups}
        return [(block, self.keep_of_block(block, keep)) for block in blocks.values()]

    def keep_of_block(
        self, block: Block, keep: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same for one sub-layer: bool [..., P] -> bool [..., H], [..., I] or [..., E].

        A mixture that would keep fewer experts than its router needs keeps none. A sub-layer
        without units keeps everything.

        Args:
            block: the sub-layer.
            keep: bool [..., P].
            rows: int64 [N], which rows of `keep` are wanted, if not all.
        """
        groups = self._groups_of_block.get(id(block))
        if groups is None:
            shape = keep.shape[:-1] if rows is None else rows.shape
            parts = block.num_heads if isinstance(block, AttentionBlock) else block.num_parts
            return keep.new_ones(*shape, parts)
        masks = []
        for group in groups:
            units = keep[..., group.start : group.stop]
            units = units if rows is None else units[rows]
            masks.append(units if group.is_parts else units[..., group.part_of_unit])
        kept = torch.stack(masks).all(dim=0) if len(masks) > 1 else masks[0]
        if isinstance(block, ExpertsBlock) and block.fewest > 1:
            kept = kept & (kept.sum(dim=-1, keepdim=True) >= block.fewest)
        return kept

    # Parameters -----------------------------------------------------------------------------------

    @property
    def num_decoder_parameters(self) -> int:
        """Parameters of the decoder layers; embeddings, final norm and LM head are left out."""
        return sum(
            size for name, size in self._sizes.items() if name.startswith(self.decoder.path + ".")
        )

    @property
    def num_model_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(self._sizes.values())

    def num_removed_parameters(self, keep: torch.Tensor) -> int:
        """Parameters that go with the removed units, shared KV heads and norms included.

        Args:
            keep: bool [P].
        """
        self.check_mask(keep, dims=1)
        return sum(self.removed_from_block(block, kept) for block, kept in self.keep_by_block(keep))

    def removed_from_block(self, block: Block, keep_parts: torch.Tensor) -> int:
        """Parameters that go when a sub-layer keeps only these parts (bool [H], [I] or [E])."""
        if bool(keep_parts.all()):
            return 0
        if not bool(keep_parts.any()):
            return self._block_size(block)
        kept = block.kept_parts(keep_parts)
        return sum(
            int((~kept[cut.owner]).sum()) * (self._sizes[cut.parameter] // len(cut.owner))
            for cut in block.cuts
        )

    def _block_size(self, block: Block) -> int:
        """Parameters that go with a whole sub-layer: all but the bias of its output projection."""
        prefixes = tuple(f"{path}." for path in (*block.modules, *block.norms))
        total = sum(size for name, size in self._sizes.items() if name.startswith(prefixes))
        return total - self._sizes.get(f"{block.output}.bias", 0)

    def _groups(self) -> Iterator[Group]:
        start = 0
        for layer in range(self.decoder.num_layers):
            attention, mlp = self.decoder.attention.get(layer), self.decoder.mlp.get(layer)
            experts = self.decoder.experts.get(layer)
            wanted: list[tuple[Kind, Block, torch.Tensor]] = []
            is_refused = self.attention in self.decoder.refused
            if attention is not None and attention.whole is None and not is_refused:
                wanted.append((self.attention, attention, self._attention_units(attention)))
            if mlp is not None and mlp.whole is None:
                wanted.append(("channel", mlp, torch.arange(mlp.num_channels)))
            if experts is not None and experts.whole is None:
                wanted.append((experts.unit, experts, torch.arange(experts.num_parts)))
            if self.sublayers and attention is not None:
                wanted.append(
                    ("attention", attention, torch.zeros(attention.num_heads, dtype=torch.int64))
                )
            for whole in (mlp, experts):
                if self.sublayers and whole is not None:
                    wanted.append(("mlp", whole, torch.zeros(whole.num_parts, dtype=torch.int64)))
            for kind, block, part_of_unit in wanted:
                count = int(part_of_unit.max()) + 1
                size = self._unit_size(kind, block, part_of_unit)
                yield Group(layer, kind, start, start + count, size, block, part_of_unit)
                start += count

    def _attention_units(self, block: AttentionBlock) -> torch.Tensor:
        if self.attention == "head":
            return torch.arange(block.num_heads)
        return torch.tensor(block.kv_of_head)

    def _unit_size(self, kind: Kind, block: Block, part_of_unit: torch.Tensor) -> int:
        if kind in ("attention", "mlp"):
            return self._block_size(block)
        keep = part_of_unit != 0
        if not bool(keep.any()):  # the only unit of its sub-layer
            return self._block_size(block)
        return self.removed_from_block(block, keep)


def recorded_kind(kind: str) -> str:
    """A kind of unit as files spell it: "kv_group"."""
    return kind.replace("-", "_")


def read_kind(text: str) -> str:
    """The opposite of `recorded_kind`."""
    return text.replace("_", "-")


def describe_layout(layout: Layout) -> dict[str, Any]:
    """Plain values, for JSON: all that a reader without the model needs to draw its units.

    Every group has its layer, its kind, its number of units, and the parameters that go with each;
    `kv_of_head` tells which KV head each query head of its layer reads, where it is about heads.
    """
    return {
        "attention": recorded_kind(layout.attention),
        "experts": layout.experts,
        "sublayers": layout.sublayers,
        "num_layers": layout.decoder.num_layers,
        "num_decoder_parameters": layout.num_decoder_parameters,
        "num_model_parameters": layout.num_model_parameters,
        "groups": [
            {
                "layer": group.layer,
                "kind": recorded_kind(group.kind),
                "num_units": len(group),
                "num_parameters": group.num_parameters,
                **(
                    {"kv_of_head": list(group.block.kv_of_head)}
                    if isinstance(group.block, AttentionBlock)
                    else {}
                ),
            }
            for group in layout.groups
        ],
    }
