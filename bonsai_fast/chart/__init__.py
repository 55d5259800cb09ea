"""Charts as SVG, without a plotting library: scales, axes and marks, and a line chart of them."""

from bonsai_fast.chart.axes import Axes
from bonsai_fast.chart.lines import Panel, draw
from bonsai_fast.chart.scale import Scale, fits, number, numbers
from bonsai_fast.chart.svg import document, element, text
from bonsai_fast.chart.theme import COLOURS, DARK, LIGHT, Theme

__all__ = [
    "COLOURS",
    "DARK",
    "LIGHT",
    "Axes",
    "Panel",
    "Scale",
    "Theme",
    "document",
    "draw",
    "element",
    "fits",
    "number",
    "numbers",
    "text",
]
