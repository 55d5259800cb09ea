"""Loss against tokens while a recovery tier trains."""

from __future__ import annotations

from dataclasses import dataclass

from bonsai_fast.report.chart import Axes, Scale, document, element, text
from bonsai_fast.report.chart.axes import BOTTOM, LEFT, TOP
from bonsai_fast.report.chart.svg import title
from bonsai_fast.report.number_format import count, significant

WIDTH, HEIGHT = 620, 280
# room for the names behind the last points
RIGHT = 90
NAMES = ("training", "held out")


@dataclass(frozen=True)
class Measured:
    """A point of a training curve: tokens so far, training loss, held-out loss if measured."""

    tokens: int
    loss: float
    held_out: float | None


def training(points: list[Measured], *, name: str, heading: str) -> str | None:
    """Two lines, training and held-out loss; None if there are fewer than two points."""
    lines = [
        [(float(point.tokens), point.loss) for point in points],
        [(float(p.tokens), p.held_out) for p in points if p.held_out is not None],
    ]
    if len(points) < 2:
        return None
    x = Scale.of((at for line in lines for at, _ in line), LEFT, WIDTH - RIGHT)
    y = Scale.of((value for line in lines for _, value in line), HEIGHT - BOTTOM, TOP)
    if x is None or y is None:
        return None
    axes = Axes(x, y)
    parts = axes.draw("tokens", "loss, nats per token", title=heading)
    for number, line in enumerate(lines):
        placed = [(point, axes.place(*point)) for point in line]
        shown = [(point, place) for point, place in placed if place is not None]
        path = " ".join(f"{place[0]:.1f},{place[1]:.1f}" for _, place in shown)
        if len(shown) > 1:
            parts += [element("polyline", points=path, class_=f"line line{number}")]
        for (tokens, loss), place in shown:
            words = f"{NAMES[number]}: {significant(loss)} after {count(int(tokens))} tokens"
            dot = {"cx": place[0], "cy": place[1], "r": 2.5, "class_": f"mark fill{number}"}
            parts += [element("circle", title(words), **dot)]
        if shown:
            last = shown[-1][1]
            parts += [text(last[0] + 8, last[1] + 4, NAMES[number], "strong")]
    return document(
        parts, WIDTH, HEIGHT, name=name, label=f"Loss against tokens, {heading}",
        description=f"{len(points)} points of the training loss, {len(lines[1])} of the loss on "
        "text that was not trained on.",
    )  # fmt: skip
