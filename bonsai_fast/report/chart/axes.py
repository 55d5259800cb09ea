"""A pair of axes: grid, ticks, labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bonsai_fast.report.chart.scale import Scale, numbers
from bonsai_fast.report.chart.svg import element, text

# what stands outside the axes, in pixels
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 42, 44


@dataclass(frozen=True)
class Axes:
    """The plotting area; `x.start` is the left edge, `y.start` the bottom.

    Attributes:
        x, y: the scales.
    """

    x: Scale
    y: Scale

    def place(self, x: float, y: float) -> tuple[float, float] | None:
        """Pixel position of a point; None if the axes cannot show it."""
        return (self.x(x), self.y(y)) if self.x.shows(x) and self.y.shows(y) else None

    def draw(
        self,
        x_label: str,
        y_label: str,
        *,
        title: str = "",
        x_text: Callable[[float], str] | None = None,
        x_ticks: list[float] | None = None,
    ) -> list[str]:
        """Everything but the data. The name of the y axis is written above it."""
        left, right, bottom, top = self.x.start, self.x.stop, self.y.start, self.y.stop
        parts = []
        if title:
            parts += [text(left, top - 26, title, "strong")]
        parts += [text(left, top - 10, y_label, "muted")]
        for value, words in zip(self.y.ticks(), numbers(self.y.ticks()), strict=True):
            at = self.y(value)
            parts += [element("line", x1=left, x2=right, y1=at, y2=at, class_="grid")]
            parts += [text(left - 6, at + 4, words, "muted", "end")]
        across = self.x.ticks() if x_ticks is None else x_ticks
        written = [x_text(value) for value in across] if x_text else numbers(across)
        for value, words in zip(across, written, strict=True):
            at = self.x(value)
            parts += [element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis")]
            parts += [text(at, bottom + 17, words, "muted", "middle")]
        parts += [element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis")]
        parts += [text((left + right) / 2, bottom + 34, x_label, "muted", "middle")]
        return parts
