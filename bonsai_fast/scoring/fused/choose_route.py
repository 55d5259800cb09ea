"""Which route a sub-layer takes, and whether it is packed first; `MaskScorer` lists the routes.

"auto" never chooses "split": no GPU has measured it yet, and on a CPU it is slower.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bonsai_fast.config.choices import ConcreteRoute, Route
from bonsai_fast.models import MLPBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.fused.gpu_rates import Rates

# On a CPU, copying a weight costs about as much as multiplying it by this many tokens. A constant,
# not a measurement: a resumed run must choose the same routes, or its last bits would differ.
COPY_TOKENS = 80.0
# With 8-bit products each copy is also quantised, which costs as much as this many tokens.
QUANTISE_TOKENS = 200.0
# On a CPU, setting removed parts to zero costs this share of the products before it.
SELECT_SHARE = 0.03
# On a CPU, separate products for one mask cost this many tokens more than a chunk of rows does.
ALONE_TOKENS = 32.0
# When a GPU copies and multiplies at the same time, this share of the shorter one is not hidden.
OVERLAP_LOSS = 0.15
# The op without logits is chosen at this relative speed already, because it needs less memory.
NLL_TIE = 0.95


def choose(
    route: Route,
    kept_share: float,
    tokens: int,
    copied_share: float | None = None,
    *,
    low: bool = False,
) -> ConcreteRoute:
    """The route for the rows of one mask in one sub-layer.

    Args:
        route: of the call; only "auto" compares costs, those of a CPU.
        kept_share: share of the sub-layer's parts that the mask keeps, in (0, 1).
        tokens: number of tokens that have this mask.
        copied_share: share of the parts that a slice of a packed sub-layer copies; None: it is not
            packed.
        low: whether products are in 8 bits.
    """
    if route == "pack" or route == "split":
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
    """Whether a sub-layer should be packed in every wave of a call; see `packed`.

    Args:
        route: of the call; "auto" compares costs, those of a CPU.
        kept_shares: share of the parts that each group of sub-models with the same states keeps.
        used_share: share of the parts that any of them keeps.
        fixed_share: share of the parts that all of them keep and slices need not copy.
        tokens: number of tokens of each group.
        waves: number of waves.
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
    """The fastest route on a GPU for some sub-models.

    Compares the time for one weight of the parent, in seconds. Attention scores and the LM head
    are left out: they take the same time on all routes.

    Args:
        rates: of the GPU.
        kept_share: share of the weights of masked sub-layers that is kept, on average.
        tokens: number of tokens of a sub-model that share a copy of its weights.
        element_size: of a weight, bytes.
        gathers: whether the gather kernels support this model.
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
    # if equal, the first, which needs the least memory
    return min(seconds, key=seconds.__getitem__)


def without_logits(rates: Rates) -> bool:
    """Whether losses should be computed by the op that writes no logits."""
    return rates.nll_ratio >= NLL_TIE


def masked_kept_share(layout: Layout, keep: Tensor) -> float:
    """Share of the weights that is kept in sub-layers that keep a part, but not all; the average.

    Args:
        layout: the units.
        keep: bool [S, P] on the CPU.
    """
    kept = total = 0.0
    for block, parts in layout.keep_by_block(keep):
        share = parts.sum(dim=1) / parts.shape[1]
        share = share[(share > 0) & (share < 1)]
        # rows of projections that have the parts' width: gate, up and down, or q and o
        size = (3 if isinstance(block, MLPBlock) else 2) * parts.shape[1] * block.part_width
        kept += size * float(share.sum())
        total += size * len(share)
    return kept / total if total else 1.0
