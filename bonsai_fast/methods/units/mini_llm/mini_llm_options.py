"""Options of method "mini-llm"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bonsai_fast.config.choices import Granularity, Perturbation, PresetName, PriorName
from bonsai_fast.config.options import SEARCH, option
from bonsai_fast.config.presets import Preset
from bonsai_fast.methods.units.unit_options import PUBLISHED_SHAPE, SparingOptions, prior_option

SCALES: dict[Perturbation, float] = {"weights": 1e-3, "weights-divided": 1e-3, "gates": 0.05}


@dataclass(frozen=True, kw_only=True)
class MiniLLMOptions(SparingOptions):
    """Options of the gradient's estimate."""

    perturbation: Perturbation = option(
        "weights",
        "What is changed slightly to estimate gradients: weights, or gates that scale each "
        "unit's output. weights-divided: as in the publication, whose formula divides by the "
        "change.",
        group=SEARCH,
    )
    perturbation_scale: float | None = option(
        None,
        "Standard deviation of the change.",
        group=SEARCH,
        positive=True,
        shown="0.001 for weights, 0.05 for gates",
    )
    directions: int = option(
        8, "Random changes to average over; each takes two forward passes.", group=SEARCH, minimum=1
    )
    granularity: Granularity = option(
        "blocks",
        "What shares a gate: nothing (units), a block of similar channels (blocks), or a "
        "decoder layer (layers).",
        group=SEARCH,
        read_with={"perturbation": ("gates",)},
    )
    prior: PriorName = prior_option({"perturbation": ("gates",)})

    @property
    def scale(self) -> float:
        """Size of a perturbation."""
        return self.perturbation_scale or SCALES[self.perturbation]


# section 4.1: the first four and the last three layers stay
SPARED: dict[str, Any] = {"spare_first": 4, "spare_last": 3}
MINI_LLM_PRESETS: Mapping[PresetName, Preset[MiniLLMOptions]] = {
    "default": Preset(MiniLLMOptions(**SPARED)),
    "paper": Preset(
        MiniLLMOptions(
            **PUBLISHED_SHAPE,
            **SPARED,
            perturbation="weights-divided",
            directions=1,
            granularity="units",
        ),
        num_sequences=128,
        sequence_length=128,
    ),
}
