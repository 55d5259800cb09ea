"""Turns a keep mask and a recorded layout into what every layer keeps."""

from __future__ import annotations

import torch

from bonsai_fast.report.figures import LayerRow
from bonsai_fast.report.run_record import GroupRecord, LayoutRecord


def layer_rows(layout: LayoutRecord, keep: torch.Tensor) -> list[LayerRow]:
    """What is kept, one row per layer.

    Args:
        keep: bool [P].
    """
    return [_row(layout, layer, keep) for layer in range(layout.num_layers)]


def unit_name(layout: LayoutRecord, position: int) -> str:
    """A unit in words, e.g. "layer 3, channel 17"."""
    group = next(group for group in layout.groups if position < group.stop)
    kind = group.kind.replace("kv_group", "KV group")
    if group.kind in ("attention", "mlp"):
        return f"layer {group.layer}, {'attention' if group.is_attention else 'MLP'}"
    return f"layer {group.layer}, {kind} {position - group.start}"


def _row(layout: LayoutRecord, layer: int, keep: torch.Tensor) -> LayerRow:
    heads: list[bool] = []
    kv_of_head: tuple[int, ...] = ()
    channels_kept = channels = 0
    is_mixture = False
    whole = {"attention": True, "mlp": True}
    for group in (group for group in layout.groups if group.layer == layer):
        kept = keep[group.start : group.stop].tolist()
        if group.kind in whole:
            whole[group.kind] = kept[0]
        elif group.is_attention:
            heads, kv_of_head = _heads(group, kept), group.kv_of_head
        else:
            channels, channels_kept = len(kept), sum(kept)
            is_mixture = group.kind == "expert"
    return LayerRow(
        layer,
        tuple(kept and whole["attention"] for kept in heads),
        kv_of_head,
        channels_kept if whole["mlp"] else 0,
        channels,
        is_mixture,
    )


def _heads(group: GroupRecord, kept: list[bool]) -> list[bool]:
    if group.kind == "head":
        return kept
    return [kept[kv] for kv in group.kv_of_head]
