"""What one layer keeps: heads as cells, channels as a bar."""

from __future__ import annotations

from dataclasses import dataclass

from bonsai_fast.report.chart import element
from bonsai_fast.report.chart.svg import NAMESPACE

CELL, CELL_GAP, GROUP_GAP, CELL_HEIGHT = 8.0, 1.5, 4.0, 10.0
# more heads than this have narrower cells
MANY_HEADS = 32
BAR_LENGTH, BAR_HEIGHT = 1000, 10


@dataclass(frozen=True)
class LayerRow:
    """What is left of one layer.

    Attributes:
        layer: its number.
        heads: whether each query head is kept; empty if the parent has no attention there.
        kv_of_head: the KV head that each of them reads.
        channels_kept, channels: of the MLP, or experts of a mixture; 0 and 0 if the parent has none
            there.
        is_mixture: whether they are experts.
    """

    layer: int
    heads: tuple[bool, ...]
    kv_of_head: tuple[int, ...]
    channels_kept: int
    channels: int
    is_mixture: bool = False

    @property
    def heads_kept(self) -> int:
        return sum(self.heads)

    @property
    def kv_groups(self) -> int:
        return len(set(self.kv_of_head))

    @property
    def kv_groups_kept(self) -> int:
        """KV heads that some kept query head reads."""
        return len({kv for kept, kv in zip(self.heads, self.kv_of_head, strict=True) if kept})


def head_cells(row: LayerRow) -> str:
    """A cell for each query head, those of one KV head side by side; kept ones are filled."""
    width = CELL if len(row.heads) <= MANY_HEADS else CELL * MANY_HEADS / len(row.heads)
    x, parts = 0.5, []
    for place, (kept, kv) in enumerate(zip(row.heads, row.kv_of_head, strict=True)):
        if place:
            x += GROUP_GAP if kv != row.kv_of_head[place - 1] else min(CELL_GAP, width / 4)
        shape = {"x": x, "y": 0.5, "width": width, "height": CELL_HEIGHT}
        parts += [element("rect", **shape, class_="cell kept" if kept else "cell gone")]
        x += width
    return _drawing(parts, x + 0.5, CELL_HEIGHT + 1)


def channel_bar(row: LayerRow) -> str:
    """As long as the parent's MLP is wide, compared with `channels`; filled as far as it stays."""
    share = row.channels_kept / row.channels if row.channels else 0.0
    parts = [
        element("rect", x=0, y=0, width=BAR_LENGTH, height=BAR_HEIGHT, class_="bar gone"),
        element("rect", x=0, y=0, width=share * BAR_LENGTH, height=BAR_HEIGHT, class_="bar kept"),
    ]
    return _drawing(parts, BAR_LENGTH, BAR_HEIGHT, preserveAspectRatio="none")


def _drawing(parts: list[str], width: float, height: float, **attributes: object) -> str:
    # the numbers stand beside it
    return element(
        "svg", *parts, xmlns=NAMESPACE, viewBox=f"0 0 {width:g} {height:g}", width=f"{width:g}",
        height=f"{height:g}", aria_hidden="true", **attributes,
    )  # fmt: skip
