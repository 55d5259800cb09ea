"""Options of every method that removes units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bonsai_fast.config.choices import AttentionUnit, HeadLayout, Precision, Route
from bonsai_fast.config.options import DEVICE, REMOVED, SEARCH, MethodOptions, option


@dataclass(frozen=True, kw_only=True)
class UnitOptions(MethodOptions):
    """Which units there are, which shapes the result may have, and how sub-models are scored."""

    attention: AttentionUnit = option(
        "kv-group",
        "Remove query heads one at a time, or KV groups with all their query heads.",
        group=REMOVED,
    )
    sublayers: bool = option(
        False, "Whole attention and MLP sub-layers are units too.", group=REMOVED
    )
    head_layout: HeadLayout = option(
        "rectangular",
        "'rectangular': all KV groups of a layer keep the same number of query heads, which every "
        "engine can run.",
        group=REMOVED,
    )
    round_to: str = option(
        "auto",
        "MLP widths become multiples of this: 'auto' (32 to 256 by size), or a number.",
        group=REMOVED,
    )
    uniform: bool = option(
        False,
        "The same heads and widths in all layers, so that the parent's own class can load the "
        "result.",
        group=REMOVED,
    )
    route: Route = option(
        "auto",
        "How masked layers are computed: whole with zeros (dense), from copies of what each "
        "sub-model keeps (slice), by kernels that gather it (gather), from one copy of what any "
        "sub-model keeps (pack), with each one's part of that copy (tail), or with one product for "
        "what all keep and kernels that gather the rest (split). 'auto' takes the cheapest, never "
        "split.",
        group=DEVICE,
    )
    precision: Precision = option(
        "full",
        "8-bit products while scoring: int8 (CPU or CUDA) or fp8 (CUDA, compute capability 8.9 or "
        "higher). The ranking is compared with full precision first.",
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
        "First decoder layers to leave whole as long as the target can be met elsewhere.",
        group=REMOVED,
        minimum=0,
    )
    spare_last: int = option(0, "Last decoder layers to leave whole.", group=REMOVED, minimum=0)


def prior_option(read_with: Mapping[str, Iterable[Any]] | None = None) -> Any:
    """The field `prior`."""
    help_text = "Importance of a unit before any sub-model is scored."
    return option("wanda", help_text, group=SEARCH, read_with=read_with)
