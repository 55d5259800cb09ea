"""Colours and style sheet of charts, for light and dark backgrounds."""

from __future__ import annotations

from dataclasses import dataclass

# distinct also for most colour-blind readers (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999933")
# the same hues, lighter
COLOURS_ON_DARK = (
    *("#5aaee6", "#f08a4b", "#3cc29b", "#e0a3c6", "#a5d8f5", "#f2c14e"),
    *("#e8e8e8", "#c9c96b"),
)
DASHES = ("", "6 3", "2 2")


@dataclass(frozen=True)
class Theme:
    """Colours of all parts of a chart.

    Attributes:
        ink, muted: of text, and of less important text.
        paper: background.
        grid, axis: of lines.
        colours: of data, in this order.
    """

    ink: str
    muted: str
    paper: str
    grid: str
    axis: str
    colours: tuple[str, ...]

    def style(self) -> str:
        """The style sheet for elements of class `chart` and those inside one."""
        rules = [
            ".chart{font:11px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}",
            f".chart text{{fill:{self.ink}}}",
            f".chart .muted{{fill:{self.muted}}}",
            ".chart .strong{font-weight:600}",
            f".chart .paper{{fill:{self.paper}}}",
            f".chart .grid{{stroke:{self.grid};stroke-width:1}}",
            f".chart .axis{{stroke:{self.axis};stroke-width:1;fill:none}}",
            ".chart .line{fill:none;stroke-width:1.5}",
        ]
        for place, colour in enumerate(self.colours):
            rules.append(f".chart .line{place}{{stroke:{colour}}}")
            rules.append(f".chart .fill{place}{{fill:{colour}}}")
        return "\n".join(rules)


LIGHT = Theme("#1a1a1a", "#5c5c5c", "#ffffff", "#e6e6e6", "#8c8c8c", COLOURS)
DARK = Theme("#e4e4e4", "#a3a3a3", "#16181a", "#2e3236", "#7d8287", COLOURS_ON_DARK)


def colour_class(kind: str, number: int) -> str:
    """Classes of the number-th series: `kind` is "line" or "fill"."""
    return f"{kind} {kind}{number % len(COLOURS)}"


def dash(number: int) -> str | None:
    """The dash pattern that distinguishes series of the same colour."""
    return DASHES[number // len(COLOURS) % len(DASHES)] or None
