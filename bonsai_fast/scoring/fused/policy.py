"""Which route a sub-layer takes: all of it with its masked part zeroed, a slice of it, or kernels
that gather what is kept; and whether it is packed first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

ConcreteRoute = Literal["dense", "slice", "gather"]
Route = Literal["auto", "dense", "slice", "gather", "pack", "tail"]

# Copying a weight takes as long as multiplying so many tokens by it. A table, not a measurement at
# run time: an interrupted run must go on with the same routes, or its last bits would differ.
COPY_TOKENS = {"cpu": 80.0, "cuda": 354.0}
# what zeroing costs beside the products it follows
SELECT_SHARE = {"cpu": 0.03, "cuda": 0.0}
# what products of one mask alone lose beside those of a chunk of rows, in tokens
ALONE_TOKENS = {"cpu": 32.0, "cuda": 0.0}


def choose(
    route: Route, device: str, kept_share: float, tokens: int, copied_share: float | None = None
) -> ConcreteRoute:
    """Route for the rows of one mask in one sub-layer.

    Args:
        route: what the user wants; "auto" decides.
        device: its type.
        kept_share: of the sub-layer's parts, in (0, 1).
        tokens: that have this mask.
        copied_share: what a slice copies; all that is kept if None.
    """
    if route == "pack":
        return "dense"
    if route == "tail":
        return "dense" if copied_share is None else "slice"
    if route != "auto":
        return route
    share = kept_share if copied_share is None else copied_share
    copied = COPY_TOKENS.get(device, COPY_TOKENS["cuda"]) * share
    if copied_share is not None:
        copied += ALONE_TOKENS.get(device, 0.0)
    saved = tokens * (1 - kept_share + SELECT_SHARE.get(device, 0.0))
    return "slice" if saved > copied else "dense"


def packing_pays(
    route: Route,
    device: str,
    kept_shares: Sequence[float],
    used_share: float,
    fixed_share: float,
    tokens: int,
    waves: int,
) -> bool:
    """Whether a sub-layer is packed in every wave of a call; see `packed`.

    Args:
        route: what the user wants; "auto" decides.
        device: its type.
        kept_shares: of the sub-layer's parts, for every group of sub-models with the same states.
        used_share: of parts that any of them keeps.
        fixed_share: of parts that all of them keep, if slices of a packed sub-layer spare them.
        tokens: of each group.
        waves: how many there are.
    """
    if route == "tail":
        return fixed_share > 0 or used_share < 1
    if route == "pack":
        return used_share < 1
    copy = COPY_TOKENS.get(device, COPY_TOKENS["cuda"])
    select, alone = SELECT_SHARE.get(device, 0.0), ALONE_TOKENS.get(device, 0.0)
    whole, packed = 0.0, waves * copy * used_share
    for share in kept_shares:
        computed = tokens * share
        whole += min(tokens * (1 + select), computed + copy * share) if share < 1 else tokens
        tail = computed + copy * (share - fixed_share) + alone
        packed += min(tokens * (used_share + select), tail)
    return packed < whole
