"""A line chart as SVG, without a plotting library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.sax.saxutils import escape

PANEL_WIDTH, PANEL_HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 34, 44
LEGEND_WIDTH, LINE = 190, 18
TICKS = 5
# distinct also for most colour-blind readers (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999933")
DASHES = ("", "6 3", "2 2")


@dataclass(frozen=True)
class Panel:
    """One pair of axes; points that they cannot show drop out: not finite, or no logarithm.

    Attributes:
        title, x_label, y_label: what is written.
        series: (x, y) points by name, joined in the order of x.
        log_x, log_y: logarithmic axes.
    """

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False


def draw(panels: list[Panel]) -> str:
    """Panels side by side, and one legend: the text of an SVG file."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    width = len(panels) * PANEL_WIDTH + LEGEND_WIDTH
    height = max(PANEL_HEIGHT, TOP + LINE * (len(names) + 1))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate({number * PANEL_WIDTH} 0)">']
        parts += [*_panel(panel, names), "</g>"]
    for row, name in enumerate(names):
        x, y = len(panels) * PANEL_WIDTH + 4, TOP + LINE * row
        parts += [f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" {_stroke(row)}/>']
        parts += [_text(x + 30, y + 4, name)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, names: list[str]) -> list[str]:
    points = {
        name: [
            (math.log10(x) if panel.log_x else x, math.log10(y) if panel.log_y else y)
            for x, y in sorted(values)
            if math.isfinite(x)
            and math.isfinite(y)
            and (x > 0 or not panel.log_x)
            and (y > 0 or not panel.log_y)
        ]
        for name, values in panel.series.items()
    }
    everything = [point for values in points.values() for point in values]
    parts = [_text(PANEL_WIDTH / 2, 18, panel.title, anchor="middle", weight="bold")]
    if not everything:
        return [*parts, _text(PANEL_WIDTH / 2, PANEL_HEIGHT / 2, "no finite value", "middle")]
    x_low, x_high = _range([x for x, _ in everything])
    y_low, y_high = _range([y for _, y in everything])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (PANEL_WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (PANEL_HEIGHT - TOP - BOTTOM)
        return LEFT + across, PANEL_HEIGHT - BOTTOM - up

    bottom, right = PANEL_HEIGHT - BOTTOM, PANEL_WIDTH - RIGHT
    for tick in range(TICKS):
        x, y = (
            low + (high - low) * tick / (TICKS - 1)
            for low, high in ((x_low, x_high), (y_low, y_high))
        )
        at_x, at_y = place(x, y)
        parts += [f'<line x1="{LEFT}" x2="{right}" y1="{at_y:.1f}" y2="{at_y:.1f}" stroke="#ddd"/>']
        parts += [_text(LEFT - 6, at_y + 4, _number(10**y if panel.log_y else y), "end")]
        parts += [_text(at_x, bottom + 15, _number(10**x if panel.log_x else x), "middle")]
    parts += [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="black"/>']
    parts += [_text((LEFT + right) / 2, PANEL_HEIGHT - 10, panel.x_label, "middle")]
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 12 {middle})"'
    parts += [
        f'<text x="12" y="{middle}" text-anchor="middle" {turned}>{escape(panel.y_label)}</text>'
    ]
    for name, values in points.items():
        places = [place(x, y) for x, y in values]
        style = _stroke(names.index(name))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if len(places) > 1:
            parts += [f'<polyline points="{path}" fill="none" {style}/>']
        colour = COLOURS[names.index(name) % len(COLOURS)]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return parts


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or max(abs(low), 1.0) * 0.1
    return low - margin, high + margin


def _stroke(number: int) -> str:
    colour = COLOURS[number % len(COLOURS)]
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}"'


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _number(value: float) -> str:
    """Three significant digits, thousands and millions by letter."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
