"""Pictures of a run as SVG; everything that they show also stands in a table of the page."""

from bonsai_fast.reporting.figures.agreement import Pair, agreement
from bonsai_fast.reporting.figures.by_layer import by_layer
from bonsai_fast.reporting.figures.descent import descent
from bonsai_fast.reporting.figures.kept import LayerRow, channel_bar, head_cells
from bonsai_fast.reporting.figures.ranked import ranked
from bonsai_fast.reporting.figures.trajectory import trajectory

__all__ = [
    "LayerRow",
    "Pair",
    "agreement",
    "by_layer",
    "channel_bar",
    "descent",
    "head_cells",
    "ranked",
    "trajectory",
]
