"""Numbers as text."""

from __future__ import annotations

import math

# no line break between a number and its unit
GAP = "\N{NO-BREAK SPACE}"
MINUS, PLUS_MINUS = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"
TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# as the minus sign and digits of an exponent
SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def count(value: int) -> str:
    """12,345."""
    return f"{value:,}"


def percent(share: float, digits: int = 1) -> str:
    """0.2 -> "20.0 %"."""
    return f"{share * 100:.{digits}f}{GAP}%".replace("-", MINUS)


def less(share: float) -> str:
    """A removed share: 0.2 -> "-20.0 %"."""
    return percent(-share)


def change(share: float) -> str:
    """A relative change with its sign: 0.5 -> "+50.0 %"."""
    return ("+" if share > 0 else "") + percent(share)


def times(ratio: float) -> str:
    """A ratio after a multiplication sign."""
    return f"{TIMES}{ratio:.2f}" if math.isfinite(ratio) else DASH


def size(num_bytes: float) -> str:
    """Bytes, in the unit that gives the shortest number."""
    for amount, unit in SIZES:
        if num_bytes >= amount:
            shown = num_bytes / amount
            return f"{shown:,.0f}{GAP}{unit}" if shown >= 100 else f"{shown:.3g}{GAP}{unit}"
    return f"{num_bytes:.0f}{GAP}B"


def decimal(value: float, digits: int = 2) -> str:
    """A fixed number of decimals, thousands separated; infinities and NaN in words."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return ("" if value > 0 else MINUS) + "\N{INFINITY}"
    return f"{value:,.{digits}f}".replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """A number of significant digits; powers of ten instead of many zeros."""
    if not math.isfinite(value):
        return decimal(value)
    mantissa, _, power = f"{value:.{digits}g}".partition("e")
    if power:
        mantissa += f"{TIMES}10{str(int(power)).translate(SUPERSCRIPT)}"
    return mantissa.replace("-", MINUS)


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g}{GAP}s"
    if seconds < 7200:
        return f"{seconds / 60:.3g}{GAP}min"
    return f"{seconds / 3600:.3g}{GAP}h"
