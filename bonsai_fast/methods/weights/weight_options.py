"""Options of the methods that zero single weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bonsai_fast.config.choices import CompareWithin, PresetName
from bonsai_fast.config.options import REMOVED, SEARCH, MethodOptions, option
from bonsai_fast.config.presets import Preset
from bonsai_fast.config.weight_pattern import UNSTRUCTURED, Pattern


@dataclass(frozen=True, kw_only=True)
class WeightOptions(MethodOptions):
    """Which weights may become zero, and whether the others are adjusted."""

    pattern: str = option(
        UNSTRUCTURED,
        "Where zeros may be: anywhere (unstructured), or N:M: of M neighbours, N are kept, such "
        "as 2:4.",
        group=REMOVED,
        value="PATTERN",
    )
    compare_within: CompareWithin = option(
        "layer",
        "Which weights compete for being kept: all of a matrix (layer), those of one input or "
        "output, or of 128 neighbouring inputs or outputs.",
        group=SEARCH,
        read_with={"pattern": (UNSTRUCTURED,)},
    )
    weight_update: bool = option(
        False, "Adjust the weights that are kept to make up for the others.", group=SEARCH
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        Pattern.parse(self.pattern)


def weight_presets(
    compare_within: CompareWithin, *, weight_update: bool
) -> Mapping[PresetName, Preset[WeightOptions]]:
    """Presets of a method from its published settings."""
    options = WeightOptions(compare_within=compare_within, weight_update=weight_update)
    return {
        "default": Preset(options),
        # Sun et al., arXiv:2306.11695, appendix A.1: of C4, which is left to the user
        "paper": Preset(options, num_sequences=128, sequence_length=2048),
    }
