"""Figures of a run as SVG; the page also has all their numbers in tables."""

from bonsai_fast.report.figures.by_layer import by_layer
from bonsai_fast.report.figures.descent import descent
from bonsai_fast.report.figures.layer_parts import LayerRow, channel_bar, head_cells
from bonsai_fast.report.figures.predicted_measured import Pair, agreement
from bonsai_fast.report.figures.ranked import ranked
from bonsai_fast.report.figures.training import Measured, training
from bonsai_fast.report.figures.trajectory import trajectory

__all__ = [
    "LayerRow",
    "Measured",
    "Pair",
    "agreement",
    "by_layer",
    "channel_bar",
    "descent",
    "head_cells",
    "ranked",
    "training",
    "trajectory",
]
