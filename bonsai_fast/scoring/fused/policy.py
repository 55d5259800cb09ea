"""Which route a sub-layer takes: all of it with its masked part zeroed, a slice of it, or kernels
that gather what is kept."""

from __future__ import annotations

from typing import Literal

ConcreteRoute = Literal["dense", "slice", "gather"]
Route = Literal["auto", "dense", "slice", "gather"]

# Copying a weight takes as long as multiplying so many tokens by it. A table, not a measurement at
# run time: an interrupted run must go on with the same routes, or its last bits would differ.
COPY_TOKENS = {"cpu": 80.0, "cuda": 354.0}
# what zeroing costs beside the products it follows
SELECT_SHARE = {"cpu": 0.03, "cuda": 0.0}


def choose(route: Route, device: str, kept_share: float, tokens: int) -> ConcreteRoute:
    """Route for the rows of one mask in one sub-layer.

    Args:
        route: what the user wants; "auto" decides.
        device: its type.
        kept_share: of the sub-layer's parts, in (0, 1).
        tokens: that have this mask.
    """
    if route != "auto":
        return route
    copied = COPY_TOKENS.get(device, COPY_TOKENS["cuda"]) * kept_share
    saved = tokens * (1 - kept_share + SELECT_SHARE.get(device, 0.0))
    return "slice" if saved > copied else "dense"
