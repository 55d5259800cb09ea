"""Figures, captions and tables about the search: what it measured and how well it predicted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from markupsafe import Markup

from bonsai_fast.methods.regression import RecordedRegression, kendall_tau
from bonsai_fast.report.figures import Pair, agreement, by_layer, descent, ranked
from bonsai_fast.report.kept_by_layer import unit_name
from bonsai_fast.report.number_format import PLUS_MINUS, count, decimal, percent, significant
from bonsai_fast.report.run_record import LayoutRecord, RunRecord
from bonsai_fast.report.search_data import layer_costs, plans, probes, searched_rounds, steps

# a ranking lists this many units at either end
LISTED = 8
KINDS = {
    "head": "query heads",
    "kv_group": "KV groups",
    "channel": "MLP channels",
    "expert": "experts",
    "attention": "attention sub-layers",
    "mlp": "MLP sub-layers",
}


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure; the first column is text, the others are right-aligned."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Section:
    """Figures with the text before them, and tables; `panels` stand side by side."""

    heading: str
    panels: bool = True
    text: list[str] = field(default_factory=list)
    figures: list[Markup] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def add(self, figures: Iterable[str | None]) -> None:
        """Add the figures that could be drawn."""
        self.figures += [Markup(figure) for figure in figures if figure is not None]


def search_section(run: RunRecord) -> Section | str:
    """Predicted against measured; or, as text, why there is nothing to compare."""
    if run.regressions:
        return _regressions(run)
    if run.layout is not None and searched_rounds(run):
        return _plans(run)
    if descended := steps(run):
        section = Section("Loss of the sampled sub-models", panels=False)
        section.text.append(
            f"{count(len(descended))} steps, each on its own part of the calibration text. Dots "
            "are means over a step's sub-models, bars reach from the best to the worst of them."
        )
        section.add([descent(descended)])
        table = Table("Loss by step, nats per token", ("step", "lowest", "mean", "highest"), [])
        for step in descended[:: max(1, len(descended) // 20)]:
            losses = (decimal(value, 3) for value in (step.lowest, step.mean, step.highest))
            table.rows.append((str(step.number), *losses))
        section.tables.append(table)
        return section
    method = run.manifest["config"].get("method")
    return f"this search by method {method} does not predict losses of sub-models."


def relevance_section(run: RunRecord) -> Section | str:
    """Relevance of units with error bars; or, as text, why it is not known."""
    if run.layout is not None and run.regressions:
        return _ranking(run, run.layout)
    if run.layout is not None and searched_rounds(run):
        return _probes(run)
    if costs := layer_costs(run):
        section = Section("How much each layer matters")
        section.text.append(
            "Loss of the parent without one layer at a time; bars are one standard error over "
            "the calibration sequences."
        )
        values = list(enumerate(costs))
        section.add(
            [by_layer(values, name="layers", heading="whole layers", y_label="nats per token")]
        )
        section.tables.append(
            Table(
                "Loss without each layer, nats per token", ("layer", "loss", "standard error"),
                [(str(n), decimal(c.value, 3), significant(c.standard_error)) for n, c in values],
            )
        )  # fmt: skip
        return section
    return "it was not estimated from sub-models, so there are no error bars."


def _regressions(run: RunRecord) -> Section:
    section = Section("Predicted and measured utility")
    section.text.append(
        "Each dot is a scored sub-model: its utility as predicted by a regression on other "
        "sub-models, and as measured. A perfect prediction lies on the dashed line."
    )
    table = Table(
        "Regressions, evaluated on held-out sub-models",
        ("round", "Kendall's tau", "R²", "sub-models", "left out"),
        [],
    )
    for name, fit in run.regressions.items():
        pairs = [Pair(float(a), float(b)) for a, b in zip(fit.held_out, fit.utility, strict=True)]
        heading = f"{name}: tau {decimal(fit.kendall_tau)}, R² {decimal(fit.r2)}"
        section.add(
            [
                agreement(
                    pairs, name=f"agreement-{name}", heading=heading,
                    x_label="predicted", y_label="measured", diagonal=True,
                )
            ]
        )  # fmt: skip
        numbers = (decimal(fit.kendall_tau, 3), decimal(fit.r2, 3))
        table.rows.append((name, *numbers, count(fit.num_rows), count(fit.num_dropped)))
    section.text.append(f"Utility is {next(iter(run.regressions.values())).quantity}.")
    section.tables.append(table)
    return section


def _plans(run: RunRecord) -> Section:
    section = Section("Predicted and measured loss of complete plans")
    section.text.append(
        "A share of each group was removed, one group at a time, to measure its cost. Each dot is "
        "a complete plan: the sum of those costs, if each grows with the square of the removed "
        "share, and the measured loss. Where the two rank plans differently, errors compound over "
        "layers, and scoring plans was better than relying on the sum."
    )
    table = Table(
        "Plans scored, by round",
        ("round", "plans", "Kendall's tau", "best loss, nats", "worst loss, nats"),
        [],
    )
    for name in searched_rounds(run):
        scores = plans(run, name)
        if not scores:
            continue
        pairs = [Pair(score.predicted, score.measured.value, score.best) for score in scores]
        measured = np.array([pair.measured for pair in pairs])
        tau = kendall_tau(np.array([pair.predicted for pair in pairs]), measured)
        section.add(
            [
                agreement(
                    pairs, name=f"agreement-{name}", heading=f"{name}: tau {decimal(tau)}",
                    x_label="sum of the measured costs, nats", y_label="loss, nats per token",
                    diagonal=False,
                )
            ]
        )  # fmt: skip
        ends = (decimal(float(measured.min()), 3), decimal(float(measured.max()), 3))
        table.rows.append((name, count(len(pairs)), decimal(tau, 3), *ends))
    section.tables.append(table)
    return section


def _probes(run: RunRecord) -> Section:
    assert run.layout is not None
    name = searched_rounds(run)[0]
    found = probes(run, name)
    section = Section("How much each layer matters")
    kinds = list(dict.fromkeys(probe.group.kind for probe in found))
    shares = ", ".join(
        f"{percent(next(p.fraction for p in found if p.group.kind == kind), 0)} of the "
        f"{KINDS[kind]}"
        for kind in kinds
    )
    section.text.append(
        f"Cost of removing {shares} from one layer at a time, units with the lowest prior first: "
        "divergence from the parent, in nats per token. Bars are one standard error over the "
        "calibration sequences."
    )
    table = Table(
        "Cost of removing a share of each group, nats per token",
        ("group", "share taken", "cost", "standard error"),
        [],
    )
    for series, kind in enumerate(kinds):
        own = [probe for probe in found if probe.group.kind == kind]
        section.add(
            [
                by_layer(
                    [(probe.group.layer, probe.cost) for probe in own],
                    name=f"cost-{kind}", heading=KINDS[kind], y_label="nats per token",
                    series=series,
                )
            ]
        )  # fmt: skip
        table.rows.extend(
            (
                f"layer {probe.group.layer}, {KINDS[kind]}",
                percent(probe.fraction),
                significant(probe.cost.value),
                significant(probe.cost.standard_error, 2),
            )
            for probe in own
        )
    section.tables.append(table)
    return section


def _ranking(run: RunRecord, layout: LayoutRecord) -> Section:
    name, fit = next(iter(run.regressions.items()))
    section = Section("Relevance of units")
    known = int((fit.relevance.isfinite() & fit.standard_error.isfinite()).sum())
    section.text.append(
        f"What the parent loses without each unit, estimated by {name} from sub-models: "
        f"{fit.quantity}. {count(known)} of {count(len(fit.relevance))} units varied and have an "
        "estimate. Bars are one standard error. A mark shared by neighbours is their mean. "
        "Kept units are blue, removed ones orange."
    )
    kept = run.kept
    keep = kept[1].keep if kept else torch.ones(layout.num_units, dtype=torch.bool)
    for kind in dict.fromkeys(group.kind for group in layout.groups):
        places = np.concatenate(
            [np.arange(group.start, group.stop) for group in layout.groups if group.kind == kind]
        )
        section.add(
            [
                ranked(
                    fit.relevance[places].numpy(), fit.standard_error[places].numpy(),
                    keep[places].numpy(), name=f"relevance-{kind}", heading=KINDS[kind],
                    y_label="relevance",
                )
            ]
        )  # fmt: skip
    section.tables.append(_ends_of(fit, layout, keep))
    return section


def _ends_of(fit: RecordedRegression, layout: LayoutRecord, keep: torch.Tensor) -> Table:
    known = (fit.relevance.isfinite() & fit.standard_error.isfinite()).nonzero().flatten()
    order = known[(-fit.relevance[known]).argsort(stable=True)].tolist()
    listed = order if len(order) <= 2 * LISTED else [*order[:LISTED], *order[-LISTED:]]
    return Table(
        "Units with the largest and the smallest relevance",
        ("unit", "relevance", "standard error", "result"),
        [
            (
                unit_name(layout, place),
                significant(float(fit.relevance[place])),
                f"{PLUS_MINUS} {significant(float(fit.standard_error[place]), 2)}",
                "kept" if keep[place] else "removed",
            )
            for place in listed
        ],
    )
