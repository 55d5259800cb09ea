"""The shapes that the attention of a layer may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Group, Layout


@dataclass(frozen=True, eq=False)
class Shape:
    """One form of the attention of a layer.

    Attributes:
        form: (KV heads, units of each of them) kept; units are query heads, or the KV head with all
            of its query heads.
        removed: parameters removed.
        lost: relevance removed.
        keep: bool [units of the group].
    """

    form: tuple[int, int]
    removed: int
    lost: float
    keep: torch.Tensor


def has_shared_heads(group: Group) -> bool:
    """Whether a group's units are query heads some of which share a KV head."""
    block = cast(AttentionBlock, group.block)
    return group.kind == "head" and block.num_heads > block.num_kv_heads


def removed_from_group(layout: Layout, group: Group, keep: torch.Tensor) -> int:
    """Parameters removed if a group keeps these of its units, bool [units of the group]."""
    return layout.removed_from_block(group.block, keep[group.part_of_unit])


def rectangles(layout: Layout, group: Group, relevance: np.ndarray) -> list[Shape]:
    """The most relevant units for every form (n KV heads, m units each), n and m >= 1.

    Units of infinite relevance stay.

    Args:
        relevance: float64 [P].
    Raises:
        ValueError: the units that must stay admit no such form.
    """
    score = relevance[group.start : group.stop]
    block = cast(AttentionBlock, group.block)
    kv_of_unit = np.array(block.kv_of_head) if group.kind == "head" else np.arange(len(group))
    # units of each KV head, best first
    members = [
        units[np.argsort(-score[units], kind="stable")]
        for units in map(np.flatnonzero, _each(kv_of_unit))
    ]
    found = []
    for m in range(1, max(map(len, members)) + 1):
        able = sorted(
            (units[:m] for units in members if len(units) >= m),
            key=lambda units: -score[units].sum(),
        )
        for n in range(1, len(able) + 1):
            keep = np.zeros(len(score), dtype=np.bool_)
            keep[np.concatenate(able[:n])] = True
            if (score[~keep] < np.inf).all():
                kept = torch.from_numpy(keep)
                found.append(
                    Shape(
                        (n, m),
                        removed_from_group(layout, group, kept),
                        float(score[~keep].sum()),
                        kept,
                    )
                )
    if not found:
        raise ValueError(
            f"layer {group.layer}: the heads that must stay cannot be made rectangular; "
            "use head_layout free"
        )
    return found


def _each(labels: np.ndarray) -> list[np.ndarray]:
    """labels [n] in 0..k-1 -> k masks bool [n]."""
    return [labels == label for label in range(labels.max() + 1)]
