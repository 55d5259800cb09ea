"""Numbers as a person reads them."""

from __future__ import annotations

import math

# between a number and its unit; a line does not break there
GAP = "\N{NO-BREAK SPACE}"
MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def count(value: int) -> str:
    """12,345."""
    return f"{value:,}"


def percent(share: float, digits: int = 1) -> str:
    """0.2 -> "20.0 %"."""
    return f"{share * 100:.{digits}f}{GAP}%".replace("-", MINUS)


def less(share: float) -> str:
    """A share that is gone: 0.2 -> "-20.0 %"."""
    return percent(-share)


def times(ratio: float) -> str:
    """A ratio, with a sign of multiplication before it."""
    return f"{TIMES}{ratio:.2f}" if math.isfinite(ratio) else DASH


def size(num_bytes: float) -> str:
    """Bytes, in the unit that gives the shortest number."""
    for amount, unit in SIZES:
        if num_bytes >= amount:
            shown = num_bytes / amount
            return f"{shown:,.0f}{GAP}{unit}" if shown >= 100 else f"{shown:.3g}{GAP}{unit}"
    return f"{num_bytes:.0f}{GAP}B"


def decimal(value: float, digits: int = 2) -> str:
    """Fixed digits behind the point, thousands separated; infinities as such."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return ("" if value > 0 else MINUS) + "\N{INFINITY}"
    return f"{value:,.{digits}f}".replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits."""
    if not math.isfinite(value):
        return decimal(value)
    return f"{value:.{digits}g}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g}{GAP}s"
    if seconds < 7200:
        return f"{seconds / 60:.3g}{GAP}min"
    return f"{seconds / 3600:.3g}{GAP}h"
