"""Perplexity against sparsity, over the rounds of a search."""

from __future__ import annotations

from bonsai_fast.report.chart import Axes, Scale, document, element, text
from bonsai_fast.report.chart.axes import BOTTOM, LEFT, TOP
from bonsai_fast.report.chart.svg import title
from bonsai_fast.report.number_format import decimal, percent

WIDTH, HEIGHT = 620, 300
# room for the words behind the last point
RIGHT = 90
# from this ratio on, a linear axis would hide the first rounds
LOG_RATIO = 4.0


def trajectory(points: list[tuple[str, float, float]]) -> str | None:
    """A line through what was measured; None if nothing of it is finite.

    Args:
        points: (name, sparsity, perplexity), the parent first and the saved model last.
    """
    values = [perplexity for _, _, perplexity in points if perplexity > 0]
    x = Scale.of((sparsity for _, sparsity, _ in points), LEFT, WIDTH - RIGHT)
    log = bool(values) and max(values) > LOG_RATIO * min(values)
    y = Scale.of(values, HEIGHT - BOTTOM, TOP, log=log)
    if x is None or y is None:
        return None
    axes = Axes(x, y)
    parts = axes.draw(
        "sparsity of the decoder",
        "perplexity" + (", logarithmic" if log else ""),
        x_text=lambda share: percent(share, 0 if share * 100 % 1 < 1e-6 else 1),
    )
    placed = [(point, axes.place(*point[1:])) for point in points]
    places = [place for _, place in placed if place is not None]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts += [element("polyline", points=path, class_="line line0")]
    for (name, sparsity, perplexity), place in placed:
        if place is None:
            continue
        words = f"{name}: {percent(sparsity, 2)}, perplexity {decimal(perplexity)}"
        parts += [
            element("circle", title(words), cx=place[0], cy=place[1], r=3.5, class_="mark fill0")
        ]
    for point, place in (placed[0], placed[-1]):
        if place is not None:
            # beside the line, which leaves the first point to the right
            rising = places[0][1] >= places[min(1, len(places) - 1)][1]
            shift = (8, 4) if point is points[-1] else (6, 15) if rising else (8, -4)
            words = f"{point[0]} {decimal(point[2])}"
            parts += [text(place[0] + shift[0], place[1] + shift[1], words, "strong")]
    return document(
        parts, WIDTH, HEIGHT, name="trajectory", label="Perplexity against sparsity",
        description=f"{len(places)} measured points, from the parent to the saved model.",
    )  # fmt: skip
