"""Options of every method that removes units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bonsai_fast.config.choices import AttentionUnit, ExpertUnit, HeadLayout, Precision, Route
from bonsai_fast.config.options import DEVICE, REMOVED, SEARCH, MethodOptions, option


@dataclass(frozen=True, kw_only=True)
class UnitOptions(MethodOptions):
    """Which units there are, which shapes the result may have, and how sub-models are scored."""

    attention: AttentionUnit = option(
        "kv-group",
        "Remove query heads (head), or KV heads with their query heads (kv-group).",
        group=REMOVED,
    )
    experts: ExpertUnit = option(
        "expert",
        "Remove whole experts, or channels of all of them.",
        group=REMOVED,
    )
    sublayers: bool = option(False, "Also remove whole attention or MLP blocks.", group=REMOVED)
    head_layout: HeadLayout = option(
        "rectangular",
        "Query heads per KV head: equally many (rectangular), as most engines need, or free.",
        group=REMOVED,
    )
    round_to: str = option(
        "auto",
        "Channels in multiples of N; auto: 32 to 256.",
        group=REMOVED,
        value="N",
    )
    uniform: bool = option(
        False,
        "Keep equally many heads and channels in all layers; the result then loads as the "
        "model's own class.",
        group=REMOVED,
    )
    route: Route = option(
        "auto",
        "How to compute sub-models; it changes speed and memory, and results by rounding alone. "
        "dense: whole layers with zeros. slice: a copy of what each keeps. gather: GPU kernels "
        "that skip the rest. pack, tail, split: the same, from one copy of what any of them keeps. "
        "auto: the fastest by estimate, never split.",
        group=DEVICE,
        value="ROUTE",
    )
    precision: Precision = option(
        "full",
        "full, or faster with 8-bit products: int8, or fp8 on GPUs of compute capability 8.9 "
        "and up. A warning says if that ranks sub-models differently.",
        group=DEVICE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_to != "auto" and not (self.round_to.isdigit() and int(self.round_to) >= 1):
            raise ValueError(
                f"round_to: expected 'auto' or a positive number, got {self.round_to!r}"
            )

    @property
    def width_multiple(self) -> int | Literal["auto"]:
        """`round_to` as `allocation.finish` takes it."""
        return "auto" if self.round_to == "auto" else int(self.round_to)


# what preset "paper" means for the shape of every method's result
PUBLISHED_SHAPE: dict[str, Any] = {"attention": "head", "head_layout": "free", "round_to": "1"}


@dataclass(frozen=True, kw_only=True)
class SparingOptions(UnitOptions):
    """Options of methods that cut once, by relevance for each parameter."""

    spare_first: int = option(
        0,
        "Leave the first N decoder layers whole if the target allows it.",
        group=REMOVED,
        minimum=0,
    )
    spare_last: int = option(0, "The same for the last N layers.", group=REMOVED, minimum=0)


def prior_option(read_with: Mapping[str, Iterable[Any]] | None = None) -> Any:
    """The field `prior`."""
    help_text = (
        "First guess of what each part is worth: weights times inputs (wanda), inputs alone "
        "(activation), how much they vary (fluctuation), what it costs if the others make up for "
        "it (obs), or the same for all (uniform). reap: experts by output "
        "times router weight, wanda for the rest."
    )
    return option("wanda", help_text, group=SEARCH, read_with=read_with)
