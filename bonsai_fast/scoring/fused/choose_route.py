"""Which route a sub-layer takes: all of it with its masked part zeroed, a slice of it, kernels that
gather what is kept, or these for its candidates alone; and whether it is packed first.

"auto" never takes "split": no GPU has measured it yet, and on a CPU it is slower.
"""

from __future__ import annotations

from collections.abc import Sequence

from bonsai_fast.config.choices import ConcreteRoute, Route
from bonsai_fast.scoring.fused.gpu_rates import Rates

# A CPU copies a weight in the time in which it multiplies so many tokens by it. A table, not a
# measurement at run time: an interrupted run must go on with the same routes, or its last bits
# would differ.
COPY_TOKENS = 80.0
# where products are in 8 bits, each copy is quantised as well, in the time of so many tokens
QUANTISE_TOKENS = 200.0
# what zeroing costs there beside the products it follows
SELECT_SHARE = 0.03
# what products of one mask alone lose there beside those of a chunk of rows, in tokens
ALONE_TOKENS = 32.0
# of the shorter of two things that a GPU does at once, so much is not hidden behind the other
OVERLAP_LOSS = 0.15
# one op without logits needs so much less memory that it may be this much slower
NLL_TIE = 0.95


def choose(
    route: Route,
    kept_share: float,
    tokens: int,
    copied_share: float | None = None,
    *,
    low: bool = False,
) -> ConcreteRoute:
    """Route for the rows of one mask in one sub-layer, on a CPU or where one was chosen before.

    Args:
        route: what is wanted; "auto" decides, though never for "split".
        kept_share: of the sub-layer's parts, in (0, 1).
        tokens: that have this mask.
        copied_share: what a slice of a packed sub-layer copies; None: it is not packed.
        low: whether products are in 8 bits.
    """
    if route == "pack" or route == "split":  # what can be split asks nobody
        return "dense"
    if route == "tail":
        return "dense" if copied_share is None else "slice"
    if route != "auto":
        return route
    lost = COPY_TOKENS * kept_share
    if copied_share is not None:
        lost = COPY_TOKENS * copied_share + ALONE_TOKENS
    if low:
        lost += QUANTISE_TOKENS * kept_share
    saved = tokens * (1 - kept_share + SELECT_SHARE)
    return "slice" if saved > lost else "dense"


def packing_pays(
    route: Route,
    kept_shares: Sequence[float],
    used_share: float,
    fixed_share: float,
    tokens: int,
    waves: int,
) -> bool:
    """Whether a sub-layer is packed in every wave of a call; see `packed`.

    Args:
        route: what is wanted; "auto" decides, for a CPU.
        kept_shares: of the sub-layer's parts, for every group of sub-models with the same states.
        used_share: of parts that any of them keeps.
        fixed_share: of parts that all of them keep, if a packed sub-layer spares them.
        tokens: of each group.
        waves: how many there are.
    """
    if route == "tail":
        return fixed_share > 0 or used_share < 1
    if route == "split":
        return used_share < 1 or 0 < fixed_share < 1
    if route == "pack":
        return used_share < 1
    if route != "auto":
        return False
    whole, packed = 0.0, waves * COPY_TOKENS * used_share
    for share in kept_shares:
        computed = tokens * share
        alone = computed + COPY_TOKENS * share
        whole += min(tokens * (1 + SELECT_SHARE), alone) if share < 1 else tokens
        tail = computed + COPY_TOKENS * (share - fixed_share) + ALONE_TOKENS
        packed += min(tokens * (used_share + SELECT_SHARE), tail)
    return packed < whole


def cheapest(
    rates: Rates, *, kept_share: float, tokens: int, element_size: int, gathers: bool = True
) -> ConcreteRoute:
    """The route that a GPU should take for sub-models of this kind.

    Times are those of one weight, in seconds, of the parent's: what is left out, attention between
    tokens and the LM head, is the same by all routes.

    Args:
        rates: of the GPU.
        kept_share: of the weights of masked sub-layers, on average.
        tokens: of every sub-model that share a copy of its weights.
        element_size: bytes of a weight.
        gathers: whether the gather kernels can compute this model.
    """
    multiplied = 2 * tokens / (rates.matmul_tflops * 1e12)
    products = multiplied * kept_share
    copies = 2 * element_size * kept_share / (rates.copy_gb_per_s * 1e9)
    seconds: dict[ConcreteRoute, float] = {
        "dense": multiplied,
        "slice": max(products, copies) + OVERLAP_LOSS * min(products, copies),
    }
    if gathers:
        seconds["gather"] = products / rates.gather_ratio
    # of equal ones the first, which needs least
    return min(seconds, key=seconds.__getitem__)


def without_logits(rates: Rates) -> bool:
    """Whether losses are taken by the op that writes no logits."""
    return rates.nll_ratio >= NLL_TIE
