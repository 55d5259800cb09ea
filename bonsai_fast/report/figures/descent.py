"""Losses of the sub-models that a descent drew, step by step."""

from __future__ import annotations

import numpy as np

from bonsai_fast.report.chart import Axes, Scale, document, element
from bonsai_fast.report.chart.axes import BOTTOM, LEFT, RIGHT, TOP
from bonsai_fast.report.chart.svg import title
from bonsai_fast.report.number_format import significant
from bonsai_fast.report.search_data import Step, binned

WIDTH, HEIGHT = 620, 280
# more steps than this share a mark with their neighbours
MARKS = 200


def descent(steps: list[Step]) -> str | None:
    """A mark for the mean of a step, and a bar from the lowest to the highest; None without any."""
    total, steps = len(steps), _thinned(steps)
    x = Scale.of((float(step.number) for step in steps), LEFT, WIDTH - RIGHT)
    ends = [end for step in steps for end in (step.lowest, step.highest)]
    y = Scale.of(ends, HEIGHT - BOTTOM, TOP)
    if x is None or y is None:
        return None
    whole = [tick for tick in x.ticks() if tick == int(tick) and tick >= 0]
    parts = Axes(x, y).draw("step", "loss, nats per token", x_ticks=whole)
    for step in steps:
        at = x(float(step.number))
        words = f"step {step.number}: {significant(step.mean)}"
        bar = {"x1": at, "x2": at, "y1": y(step.lowest), "y2": y(step.highest)}
        parts += [element("line", **bar, class_="error line line0")]
        dot = {"cx": at, "cy": y(step.mean), "r": 2}
        parts += [element("circle", title(words), **dot, class_="mark fill0")]
    return document(
        parts, WIDTH, HEIGHT, name="descent", label="Loss of the sub-models of each step",
        description=f"{total} steps, {len(steps)} marks: lowest, mean and highest loss.",
    )  # fmt: skip


def _thinned(steps: list[Step]) -> list[Step]:
    return [
        Step(
            steps[part[len(part) // 2]].number,
            min(steps[place].lowest for place in part),
            float(np.mean([steps[place].mean for place in part])),
            max(steps[place].highest for place in part),
        )
        for part in binned(np.arange(len(steps)), MARKS)
        if len(part)
    ]
