"""Which sub-models are scored: sampling around the current one, complements, and bit packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bonsai_fast.models.layout import Kind, Layout

Seed = int | Sequence[int]


@dataclass(frozen=True, eq=False)
class _Pool:
    """The units of one group that may be removed in a sub-model, weakest first."""

    kind: Kind
    positions: np.ndarray  # int64 [n], in the layout
    weights: np.ndarray  # float64 [n], > 0: likelihood of being kept
    size: float  # how many of them take part in a pair of sub-models, on average


def sample_submodels(
    layout: Layout,
    prior: torch.Tensor,
    keep: torch.Tensor,
    *,
    step_sparsity: float,
    num_submodels: int,
    seed: Seed,
) -> torch.Tensor:
    """Draw sub-models around the current one, each with its complement in the next row.

    In each group (layer, kind) the n units still kept are ranked by the prior. The top 1 - 2p of
    them stay in every sub-model; half of the bottom 2p, the candidates, are removed: those kept are
    drawn one after another without replacement, each with likelihood proportional to its prior. The
    complement removes the other half. With p = `step_sparsity` every sub-model thus removes the
    fraction p of the units still kept.

    2pn is seldom whole, and below one where groups are small (9 heads, p = 0.05). Its fraction is
    the share of pairs in which the next stronger unit is a candidate too; odd numbers of candidates
    are halved up or down at random. Both are spread over the groups of a kind, so that every
    sub-model removes p of each kind to within one unit, and every unit of the bottom part is
    removed in some sub-model if there are enough of them.

    Args:
        prior: float [P], >= 0; +inf: the unit is never removed. Only ratios inside a group matter;
            where all are zero, all are alike.
        keep: bool [P], the current sub-model; units already removed stay so.
        step_sparsity: p, in (0, 0.5].
        num_submodels: S. Rows 2i and 2i + 1 are complements; if S is odd the last complement is
            left out.
        seed: one or more non-negative integers, such as (seed, round). The same seed gives the same
            rows everywhere, and a larger S only adds rows.
    Returns:
        bool [S, P].
    Raises:
        ValueError: an argument is out of range, a shape is wrong, or no unit can be removed.
    Source: Dery et al., arXiv:2402.05406, section 3.2 and algorithm 1, lines 4-6.
    """
    if num_submodels < 1:
        raise ValueError(f"num_submodels: expected a positive number, got {num_submodels}")
    pools = list(_pools(layout, prior, keep, step_sparsity))
    if not pools:
        raise ValueError(
            "nothing can be removed: every unit is removed already or has an infinite prior"
        )
    num_pairs = (num_submodels + 1) // 2
    sizes, removals = _counts(pools, num_pairs, seed)

    first = np.repeat(keep.cpu().numpy()[None], num_pairs, axis=0)
    active = np.zeros_like(first)
    for number, pool in enumerate(pools):
        rng = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(1, number)))
        )
        removed = _race(pool.weights, sizes[:, number], removals[:, number], rng)
        first[:, pool.positions] &= ~removed
        active[:, pool.positions] = np.arange(len(pool.positions)) < sizes[:, number, None]

    masks = torch.empty((num_submodels, len(layout)), dtype=torch.bool)
    masks[0::2] = torch.from_numpy(first)
    masks[1::2] = complement(masks[0::2], torch.from_numpy(active))[: num_submodels // 2]
    return masks


def candidates(
    layout: Layout, prior: torch.Tensor, keep: torch.Tensor, *, step_sparsity: float
) -> torch.Tensor:
    """The units that `sample_submodels` may remove, given the same arguments: bool [P]."""
    found = torch.zeros(len(layout), dtype=torch.bool)
    for pool in _pools(layout, prior, keep, step_sparsity):
        found[torch.from_numpy(pool.positions)] = True
    return found


def complement(masks: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Flip the candidates, bool [P] or [..., P], and no others: bool [..., P] -> bool [..., P]."""
    return masks ^ candidates


def pack(masks: torch.Tensor) -> torch.Tensor:
    """Eight units a byte: bool [..., P] -> uint8 [..., ceil(P / 8)].

    Unit i is bit i % 8, the lowest first, of byte i // 8; spare bits are zero.
    """
    if masks.dtype != torch.bool:
        raise TypeError(f"pack: expected a bool mask, got {masks.dtype}")
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1, bitorder="little"))


def unpack(packed: torch.Tensor, num_units: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., ceil(P / 8)] -> bool [..., P], P = `num_units`."""
    width = (num_units + 7) // 8
    if packed.dtype != torch.uint8 or packed.shape[-1:] != (width,):
        raise ValueError(
            f"unpack: expected uint8 [..., {width}] for {num_units} units, got {packed.dtype} "
            f"{tuple(packed.shape)}"
        )
    bits = np.unpackbits(packed.cpu().numpy(), axis=-1, count=num_units, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def _pools(
    layout: Layout, prior: torch.Tensor, keep: torch.Tensor, step_sparsity: float
) -> Iterator[_Pool]:
    layout.check_mask(keep, dims=1)
    if not 0 < step_sparsity <= 0.5:
        raise ValueError(f"step_sparsity: expected a number in (0, 0.5], got {step_sparsity}")
    if prior.shape != (len(layout),):
        raise ValueError(
            f"prior: expected shape [P] with P = {len(layout)} units, got {tuple(prior.shape)}"
        )
    strength, kept = prior.detach().cpu().double().numpy(), keep.cpu().numpy()
    if np.isnan(strength).any() or (strength < 0).any():
        raise ValueError("prior: expected values >= 0, got negative ones or NaN")
    for group in layout.groups:
        positions = group.start + np.flatnonzero(kept[group.start : group.stop])
        # rounded, so that 2 * 0.05 * 30 is three candidates and not a little more
        size = round(2 * step_sparsity * len(positions), 9)
        positions = positions[np.isfinite(strength[positions])]
        size = min(size, len(positions))
        if size > 0:
            weakest = positions[np.argsort(strength[positions], kind="stable")][
                : int(np.ceil(size))
            ]
            yield _Pool(group.kind, weakest, _weights(strength[weakest]), size)


def _weights(strength: np.ndarray) -> np.ndarray:
    """Strengths made positive: units without any are far weaker than others, and alike."""
    highest = strength.max()
    if highest == 0:
        return np.ones_like(strength)
    weights: np.ndarray = np.maximum(strength / highest, 1e-12)
    return weights


def _counts(pools: list[_Pool], num_pairs: int, seed: Seed) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of each pair and pool, and how many go in the first row: int64 [pairs, pools]."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0,))))
    kinds = np.unique([pool.kind for pool in pools], return_inverse=True)[1]
    expected = np.array([pool.size for pool in pools])
    sizes, removals = [], []
    for _ in range(num_pairs):
        sizes.append(_spread_round(expected, kinds, rng))
        removals.append(_spread_round(sizes[-1] / 2, kinds, rng))
    return np.stack(sizes), np.stack(removals)


def _spread_round(values: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round at random with the right mean, the sum over each kind being off by less than one."""
    order = np.lexsort((rng.random(len(values)), kinds))
    whole = np.floor(values)
    up = np.empty(len(values))
    up[order] = np.diff(np.floor(np.cumsum((values - whole)[order]) + rng.random()), prepend=0.0)
    rounded: np.ndarray = (whole + up).astype(np.int64)
    return rounded


def _race(
    weights: np.ndarray, sizes: np.ndarray, removals: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Remove `removals[i]` of the first `sizes[i]` units: bool [pairs, n], True = removed.

    Every unit arrives after an exponential time with its weight as the rate; the last ones are
    removed. Those kept are then a weighted draw without replacement.
    """
    arrival = -np.log1p(-rng.random((len(sizes), len(weights)))) / weights
    arrival[np.arange(len(weights)) >= sizes[:, None]] = -1.0
    last = np.arange(len(weights)) >= len(weights) - removals[:, None]
    removed = np.zeros(arrival.shape, dtype=np.bool_)
    np.put_along_axis(removed, np.argsort(arrival, axis=1, kind="stable"), last, axis=1)
    return removed
