"""Options of method "policy-gradient"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bonsai_fast.config.choices import (
    Baseline,
    GranularityOrShares,
    Initial,
    PresetName,
    PriorName,
    Projection,
)
from bonsai_fast.config.options import SEARCH, option
from bonsai_fast.config.presets import Preset
from bonsai_fast.methods.units.unit_options import PUBLISHED_SHAPE, SparingOptions, prior_option
from bonsai_fast.methods.units.variables import BLOCKS


@dataclass(frozen=True, kw_only=True)
class PolicyGradientOptions(SparingOptions):
    """Options of the descent on keep probabilities."""

    rounds: int = option(20, "Steps of gradient descent.", group=SEARCH, minimum=1)
    submodels_per_round: int = option(
        32, "Sub-models to score in each step.", group=SEARCH, minimum=1
    )
    batch_size: int = option(1, "Sequences to score them on in each step.", group=SEARCH, minimum=1)
    learning_rate: float = option(0.03, "Size of the steps.", group=SEARCH, positive=True)
    granularity: GranularityOrShares = option(
        "shares",
        "What is learned: a probability for each unit (units), block of similar channels "
        "(blocks) or decoder layer (layers), or the share to remove from each layer's attention "
        "and MLP (shares).",
        group=SEARCH,
    )
    baseline: Baseline = option(
        "leave-one-out",
        "What a loss is compared with: recent losses (moving-average), the others of its step "
        "(leave-one-out), or those of sub-models drawn in opposite pairs (antithetic).",
        group=SEARCH,
    )
    initial: Initial = option(
        "wanda-sp",
        "Start of the probabilities: the importance of method wanda-sp or layerwise-ppl, "
        "random, or random with a sparsity that rises slowly (random-progressive).",
        group=SEARCH,
    )
    projection: Projection = option(
        "sigmoid-budget",
        "How importance becomes a probability: a sigmoid shifted to meet the target "
        "(sigmoid-budget), a sigmoid of the normalised importance (sigmoid-norm), or one of two "
        "constants (score-const).",
        group=SEARCH,
        read_with={"granularity": ("units", "blocks", "layers")},
    )
    prior: PriorName = prior_option({"initial": ("wanda-sp",), "granularity": tuple(BLOCKS)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sublayers:
            raise ValueError(
                "policy-gradient does not support sublayers; choose granularity layers"
            )
        if self.granularity == "shares" and self.initial == "layerwise-ppl":
            raise ValueError(
                "granularity shares does not support initial layerwise-ppl; choose another initial"
            )


POLICY_GRADIENT_PRESETS: Mapping[PresetName, Preset[PolicyGradientOptions]] = {
    "default": Preset(PolicyGradientOptions()),
    # section 4.1, but for the text: one epoch of 120,000 segments there
    "paper": Preset(
        PolicyGradientOptions(
            **PUBLISHED_SHAPE,
            rounds=15000,
            submodels_per_round=2,
            batch_size=8,
            learning_rate=2e-3,
            granularity="units",
            baseline="moving-average",
            projection="sigmoid-norm",
        ),
        num_sequences=8192,
        sequence_length=128,
    ),
}
