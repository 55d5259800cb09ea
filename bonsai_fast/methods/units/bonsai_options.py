"""Options of method "bonsai"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bonsai_fast.config.choices import PresetName, PriorName, PriorOrAuto, RegressionName
from bonsai_fast.config.options import SEARCH, option
from bonsai_fast.config.presets import Preset
from bonsai_fast.methods.units.unit_options import PUBLISHED_SHAPE, UnitOptions
from bonsai_fast.models.layout import Layout


@dataclass(frozen=True, kw_only=True)
class BonsaiOptions(UnitOptions):
    """Options of both variants."""

    regression: RegressionName = option(
        "groups",
        "How the losses are explained: by the share that is kept of each layer's attention and "
        "MLP (groups), or by the units that are kept (ridge; paper: the published regression).",
        group=SEARCH,
    )
    prior: PriorOrAuto = option(
        "auto",
        "First guess of what each part is worth: obs, wanda, activation, fluctuation, reap or "
        "uniform, as for other methods. auto: obs if output projections are refitted afterwards, "
        "and plans are then scored with theirs refitted; else wanda; reap for experts.",
        group=SEARCH,
        value="PRIOR",
    )
    rounds: int | None = option(
        None,
        "Rounds of scoring and removal.",
        group=SEARCH,
        minimum=1,
        shown="as many as the target needs",
    )
    submodels_per_round: int = option(
        200,
        "Sub-models to score in each round.",
        group=SEARCH,
        minimum=1,
        read_with={"regression": ("ridge", "paper")},
    )

    def usual_prior(self, layout: Layout) -> PriorName:
        """The prior where sub-models are not scored as compensated."""
        if self.prior != "auto":
            return self.prior
        return "reap" if "expert" in layout.kinds else "wanda"


BONSAI_PRESETS: Mapping[PresetName, Preset[BonsaiOptions]] = {
    "default": Preset(BonsaiOptions()),
    # tables 8 and 9; one round removes p_iter = 0.05, so `rounds` follows from the target
    "paper": Preset(BonsaiOptions(**PUBLISHED_SHAPE, regression="paper", prior="wanda"), 32, None),
}
