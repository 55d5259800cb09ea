"""Relevance of all units in order, with error bars, however many there are."""

from __future__ import annotations

import numpy as np

from bonsai_fast.report.chart import Axes, Scale, document, element
from bonsai_fast.report.chart.axes import BOTTOM, LEFT, TOP
from bonsai_fast.report.chart.svg import title
from bonsai_fast.report.number_format import PLUS_MINUS, count, significant
from bonsai_fast.report.search_data import binned

WIDTH, HEIGHT = 340, 260
RIGHT = 10
# more units than this share a mark with their neighbours
MARKS = 120


def ranked(
    relevance: np.ndarray,
    standard_error: np.ndarray,
    kept: np.ndarray,
    *,
    name: str,
    heading: str,
    y_label: str,
) -> str | None:
    """From the largest to the smallest; None if nothing is known about any unit.

    Args:
        relevance, standard_error: float64 [n]; units of infinite relevance are left out.
        kept: bool [n], colours the marks.
        name: for ids on the page.
        heading: what stands above it.
    """
    known = np.flatnonzero(np.isfinite(relevance) & np.isfinite(standard_error))
    if not len(known):
        return None
    order = known[np.argsort(-relevance[known], kind="stable")]
    marks = [
        (
            float(relevance[part].mean()),
            float(standard_error[part].mean()),
            int(kept[part].sum()),
            len(part),
        )
        for part in binned(order, MARKS)
    ]
    ends = [end for value, error, _, _ in marks for end in (value - error, value + error)]
    y = Scale.of([0.0, *ends], HEIGHT - BOTTOM, TOP)
    x = Scale.of([0.0, float(len(order))], LEFT, WIDTH - RIGHT)
    assert x is not None and y is not None
    parts = Axes(x, y).draw(
        "rank", y_label, title=heading,
        x_text=lambda rank: count(int(rank)),
        x_ticks=[tick for tick in x.ticks() if 0 <= tick <= len(order)],
    )  # fmt: skip
    zero = y(0.0)
    parts += [element("line", x1=x.start, x2=x.stop, y1=zero, y2=zero, class_="axis")]
    start = 0
    for value, error, stay, size in marks:
        at = x(start + size / 2)
        start += size
        series = 0 if 2 * stay >= size else 1
        words = f"{significant(value)} {PLUS_MINUS} {significant(error, 2)}: "
        words += (
            f"{count(stay)} of {count(size)} kept" if size > 1 else ("kept" if stay else "removed")
        )
        bar = {"x1": at, "x2": at, "y1": y(value - error), "y2": y(value + error)}
        parts += [element("line", **bar, class_=f"error line line{series}")]
        dot = {"cx": at, "cy": y(value), "r": 2}
        parts += [element("circle", title(words), **dot, class_=f"mark fill{series}")]
    shared = f", {len(marks)} marks of neighbours" if len(marks) < len(order) else ""
    return document(
        parts, WIDTH, HEIGHT, name=name, label=f"{heading} in order of relevance",
        description=f"{count(len(order))} units{shared}, with one standard error.",
    )  # fmt: skip
