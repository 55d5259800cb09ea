"""Predicted against measured: a point for each sub-model."""

from __future__ import annotations

from dataclasses import dataclass

from bonsai_fast.report.chart import Axes, Scale, document, element, text
from bonsai_fast.report.chart.axes import BOTTOM, LEFT, TOP
from bonsai_fast.report.chart.scale import fits
from bonsai_fast.report.chart.svg import title
from bonsai_fast.report.number_format import significant

WIDTH, HEIGHT = 340, 290
RIGHT = 10


@dataclass(frozen=True)
class Pair:
    """One sub-model; `marked` is the one that was taken."""

    predicted: float
    measured: float
    marked: bool = False


def agreement(
    pairs: list[Pair], *, name: str, heading: str, x_label: str, y_label: str, diagonal: bool
) -> str | None:
    """A scatter plot; None if no pair is finite.

    Args:
        name: for ids on the page.
        heading: what stands above it.
        diagonal: both axes have the same unit: a line shows where points should lie.
    """
    shown = [p for p in pairs if fits(p.predicted, False) and fits(p.measured, False)]
    xs, ys = [p.predicted for p in shown], [p.measured for p in shown]
    x = Scale.of(xs, LEFT, WIDTH - RIGHT)
    y = Scale.of(ys, HEIGHT - BOTTOM, TOP)
    if x is None or y is None:
        return None
    parts = Axes(x, y).draw(x_label, y_label, title=heading)
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        if low < high:
            ends = {"x1": x(low), "y1": y(low), "x2": x(high), "y2": y(high)}
            parts += [element("line", **ends, class_="axis", stroke_dasharray="3 3")]
    for pair in sorted(shown, key=lambda pair: pair.marked):
        words = f"predicted {significant(pair.predicted)}, measured {significant(pair.measured)}"
        series, radius = ("fill1", 4.5) if pair.marked else ("fill0", 2.5)
        at = {"cx": x(pair.predicted), "cy": y(pair.measured), "r": radius}
        parts += [element("circle", title(words), **at, class_=f"mark {series} dot")]
        if pair.marked:
            end = at["cx"] > WIDTH / 2
            place = at["cx"] + (-8 if end else 8), at["cy"] + 4
            parts += [text(*place, "chosen", "strong", "end" if end else "start")]
    return document(
        parts, WIDTH, HEIGHT, name=name, label=f"{heading}: {y_label} against {x_label}",
        description=f"{len(shown)} sub-models.",
    )  # fmt: skip
