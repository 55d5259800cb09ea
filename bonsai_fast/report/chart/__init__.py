"""Charts as SVG without a plotting library: scales, axes, marks and line charts."""

from bonsai_fast.report.chart.axes import Axes
from bonsai_fast.report.chart.lines import Panel, draw
from bonsai_fast.report.chart.scale import Scale, fits, number, numbers
from bonsai_fast.report.chart.svg import document, element, text
from bonsai_fast.report.chart.theme import COLOURS, DARK, LIGHT, Theme

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
