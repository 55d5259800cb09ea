"""A value with its error bar for every layer."""

from __future__ import annotations

import math

from bonsai_fast.report.chart import Axes, Scale, document, element
from bonsai_fast.report.chart.axes import BOTTOM, LEFT, TOP
from bonsai_fast.report.chart.svg import title
from bonsai_fast.report.number_format import PLUS_MINUS, significant
from bonsai_fast.report.search_data import Estimate

WIDTH, HEIGHT = 340, 260
RIGHT = 10
LOG_RATIO = 10.0


def by_layer(
    values: list[tuple[int, Estimate]], *, name: str, heading: str, y_label: str, series: int = 0
) -> str | None:
    """Dots with bars of one standard error to either side; None if nothing is finite.

    Args:
        values: (layer, value).
        name: for ids on the page.
        heading: what stands above it.
        series: colour.
    """
    shown = [(layer, value) for layer, value in values if math.isfinite(value.value)]
    middles = [value.value for _, value in shown]
    if not middles:
        return None
    log = min(middles) > 0 and max(middles) > LOG_RATIO * min(middles)
    ends = [end for _, value in shown for end in _ends(value)]
    # a bar that reaches zero must not extend a logarithmic axis
    floor = min(middles) / 3 if log else -math.inf
    y = Scale.of([*middles, *(end for end in ends if end >= floor)], HEIGHT - BOTTOM, TOP, log=log)
    x = Scale.of((float(layer) for layer, _ in shown), LEFT, WIDTH - RIGHT)
    assert x is not None and y is not None
    whole = [float(t) for t in x.ticks() if t == int(t) and t >= 0]
    parts = Axes(x, y).draw(
        "layer", y_label + (", logarithmic" if log else ""), title=heading,
        x_text=lambda layer: f"{layer:.0f}", x_ticks=whole,
    )  # fmt: skip
    for layer, value in shown:
        at = x(float(layer))
        low, high = _ends(value)
        low_at = y(low) if y.shows(low) else y.start
        words = f"layer {layer}: {significant(value.value)}"
        if math.isfinite(value.standard_error):
            words += f" {PLUS_MINUS} {significant(value.standard_error, 2)}"
            bar = {"x1": at, "x2": at, "y1": low_at, "y2": y(high)}
            parts += [element("line", **bar, class_=f"error line line{series}")]
        dot = {"cx": at, "cy": y(value.value), "r": 3}
        parts += [element("circle", title(words), **dot, class_=f"mark fill{series}")]
    return document(
        parts, WIDTH, HEIGHT, name=name, label=f"{heading}, by layer",
        description=f"{y_label} of {len(shown)} layers, with one standard error.",
    )  # fmt: skip


def _ends(value: Estimate) -> tuple[float, float]:
    error = value.standard_error if math.isfinite(value.standard_error) else 0.0
    return value.value - error, value.value + error
