"""Launch configurations: one chosen default, the search space only on request."""

from __future__ import annotations

import os

from triton import Config


def tunable(best: Config, *candidates: Config) -> list[Config]:
    """`[best]`, or all of them when `BONSAI_FAST_AUTOTUNE=1` is set at import.

    With one configuration Triton measures nothing, so a run compiles once and is reproducible.
    """
    if os.environ.get("BONSAI_FAST_AUTOTUNE") == "1":
        return [best, *candidates]
    return [best]
