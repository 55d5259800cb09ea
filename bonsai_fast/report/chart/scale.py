"""Maps values to positions on an axis, and chooses round tick values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MARGIN = 0.05
MOST_DIGITS = 9
# a step between ticks is one of these, times a power of ten
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis.

    Attributes:
        low, high: the ends, as values, or as their logarithms to base ten.
        start, stop: where they lie.
        log: logarithmic.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def of(
        cls, values: Iterable[float], start: float, stop: float, *, log: bool = False
    ) -> Scale | None:
        """An axis that spans all values it can show, with a small margin; None if there is none."""
        shown = [math.log10(v) if log else v for v in values if fits(v, log)]
        if not shown:
            return None
        low, high = min(shown), max(shown)
        margin = MARGIN * (high - low) or max(abs(low), 1.0) * 0.1
        return cls(low - margin, high + margin, start, stop, log)

    def shows(self, value: float) -> bool:
        """Whether a value can be shown."""
        return fits(value, self.log)

    def __call__(self, value: float) -> float:
        """Position of a value, clamped to the ends."""
        inner = math.log10(value) if self.log else value
        share = (inner - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values between the ends."""
        if not self.log:
            return _round_values(self.low, self.high, count)
        bottom, top = 10.0**self.low, 10.0**self.high
        first, last = math.ceil(self.low), math.floor(self.high)
        if last - first + 1 >= 3:
            every = max(1, math.ceil((last - first + 1) / count))
            return [10.0**power for power in range(first, last + 1, every)]
        inner = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1.0, 2.0, 5.0)]
        inner = [value for value in inner if bottom <= value <= top]
        return inner if len(inner) >= 3 else _round_values(bottom, top, count)


def number(value: float, digits: int = 3) -> str:
    """A number with some significant digits; K and M for thousands and millions."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.{digits}g}{letter}"
    return f"{value:.{digits}g}" if abs(value) < 1000 or digits > 3 else f"{value:.0f}"


def numbers(values: list[float]) -> list[str]:
    """Tick values with as many digits as are needed to tell them apart."""
    written = [number(value) for value in values]
    for digits in range(4, MOST_DIGITS + 1):
        if len(set(written)) == len(values):
            break
        written = [number(value, digits) for value in values]
    return written


def fits(value: float, log: bool) -> bool:
    """Whether an axis can show a value: finite, and positive on a logarithmic axis."""
    return math.isfinite(value) and (value > 0 or not log)


def _round_values(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * next(step for step in STEPS if step * size >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # through text, so that 3 * 0.1 is 0.3
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]
