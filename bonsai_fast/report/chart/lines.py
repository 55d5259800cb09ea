"""Line charts side by side, with one legend: the text of an SVG file."""

from __future__ import annotations

from dataclasses import dataclass

from bonsai_fast.report.chart.axes import BOTTOM, LEFT, RIGHT, TOP, Axes
from bonsai_fast.report.chart.scale import Scale, fits
from bonsai_fast.report.chart.svg import document, element, text
from bonsai_fast.report.chart.theme import LIGHT, colour_class, dash

PANEL_WIDTH, PANEL_HEIGHT = 380, 300
LEGEND_WIDTH, LINE = 190, 18


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Points that it cannot show are left out: not finite, or without logarithm.

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
    """Panels side by side with one legend, as the text of an SVG file."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    width = len(panels) * PANEL_WIDTH + LEGEND_WIDTH
    height = max(PANEL_HEIGHT, TOP + LINE * (len(names) + 1))
    parts = [
        element("style", LIGHT.style()),
        element("rect", width=width, height=height, class_="paper"),
    ]
    for place, panel in enumerate(panels):
        shift = f"translate({place * PANEL_WIDTH} 0)"
        parts += [element("g", *_panel(panel, names), transform=shift)]
    for row, name in enumerate(names):
        x, y = len(panels) * PANEL_WIDTH + 4, TOP + LINE * row
        style = {"class_": colour_class("line", row), "stroke_dasharray": dash(row)}
        parts += [element("line", x1=x, x2=x + 24, y1=y, y2=y, **style), text(x + 30, y + 4, name)]
    return document(parts, width, height) + "\n"


def _panel(panel: Panel, names: list[str]) -> list[str]:
    everything = [
        (x, y)
        for values in panel.series.values()
        for x, y in values
        if fits(x, panel.log_x) and fits(y, panel.log_y)
    ]
    x = Scale.of((x for x, _ in everything), LEFT, PANEL_WIDTH - RIGHT, log=panel.log_x)
    y = Scale.of((y for _, y in everything), PANEL_HEIGHT - BOTTOM, TOP, log=panel.log_y)
    if x is None or y is None:
        return [
            text(LEFT, TOP - 26, panel.title, "strong"),
            text(PANEL_WIDTH / 2, PANEL_HEIGHT / 2, "no finite value", "muted", "middle"),
        ]
    axes = Axes(x, y)
    parts = axes.draw(panel.x_label, panel.y_label, title=panel.title)
    for name, values in panel.series.items():
        series = names.index(name)
        placed = [axes.place(*point) for point in sorted(values)]
        places = [place for place in placed if place is not None]
        if len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            style = {"class_": colour_class("line", series), "stroke_dasharray": dash(series)}
            parts += [element("polyline", points=path, **style)]
        colour = colour_class("fill", series)
        parts += [element("circle", cx=x, cy=y, r=3, class_=colour) for x, y in places]
    return parts
