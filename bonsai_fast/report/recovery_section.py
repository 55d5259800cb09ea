"""What recovery did: loss before and after each tier, and the training curves."""

from __future__ import annotations

from typing import Any

from bonsai_fast.report.figures import Measured, training
from bonsai_fast.report.number_format import count, decimal, duration, significant, size, times
from bonsai_fast.report.search_section import Section, Table

# a curve's table lists about this many points
LISTED = 20


def recovery_section(recovery: dict[str, Any], dense: float, recovered: float) -> Section:
    """The section of a finished model.

    Args:
        recovery: `RecoveryResult` as plain values.
        dense, recovered: perplexities of the parent and of the recovered model.
    """
    section = Section("Recovery", panels=False)
    before = recovery["perplexity_before"]
    section.text += [
        f"After pruning, the model was recovered with {recovery['recover']}: its perplexity was "
        f"{decimal(before)} ({times(before / dense)}) and is {decimal(recovered)} "
        f"({times(recovered / dense)}).",
        "Each tier was checked on text that neither it nor the search had read, which is not the "
        f"evaluation text: {recovery['held_out']}.",
    ]
    tiers = Table(
        "Tiers, in the order in which they ran; losses on held-out text, nats per token",
        ("tier", "text", "tokens", "loss before", "loss after", "change", "time", "memory"),
        [],
    )
    for tier in recovery["tiers"]:
        tiers.rows.append(_row(tier, recovery["texts"][tier["name"]]))
        section.text += [f"{tier['name'].capitalize()}: {note}." for note in tier["notes"]]
    section.tables.append(tiers)
    for tier in recovery["tiers"]:
        points = [Measured(**point) for point in tier["curve"]]
        section.add([training(points, name=f"training-{tier['name']}", heading=tier["name"])])
        if points:
            section.tables.append(_curve(tier["name"], points))
        if tier["settings"]:
            settings = sorted(tier["settings"].items())
            rows: list[tuple[str, ...]] = [(name, _words(value)) for name, value in settings]
            caption = f"Settings of {tier['name']}"
            section.tables.append(Table(caption, ("setting", "value"), rows))
    return section


def _row(tier: dict[str, Any], text: str) -> tuple[str, ...]:
    before, after, peak = tier["held_out_before"], tier["held_out_after"], tier["peak_bytes"]
    return (
        tier["name"],
        text,
        count(tier["tokens"]),
        decimal(before, 4),
        decimal(after, 4),
        decimal(after - before, 4),
        duration(tier["seconds"]),
        "not measured" if peak is None else size(peak),
    )


def _curve(name: str, points: list[Measured]) -> Table:
    table = Table(
        f"Training of {name}, nats per token", ("tokens", "training loss", "held-out loss"), []
    )
    for point in points[:: max(1, len(points) // LISTED)]:
        held_out = "" if point.held_out is None else decimal(point.held_out, 4)
        table.rows.append((count(point.tokens), decimal(point.loss, 4), held_out))
    return table


def _words(value: float | int | str) -> str:
    return significant(value) if isinstance(value, float) else str(value)
