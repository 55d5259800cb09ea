"""What a search measured, and how well it was predicted: figures, captions, tables."""

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

# of a ranking, this many units at either end are listed
LISTED = 8
KINDS = {
    "head": "query heads",
    "kv_group": "KV groups",
    "channel": "MLP channels",
    "attention": "attention sub-layers",
    "mlp": "MLP sub-layers",
}


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure; the first column is words, the others are right-aligned."""

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
        """Add what could be drawn."""
        self.figures += [Markup(figure) for figure in figures if figure is not None]


def search_section(run: RunRecord) -> Section | str:
    """Predicted against measured; or, in words, why there is nothing to compare."""
    if run.regressions:
        return _regressions(run)
    if run.layout is not None and searched_rounds(run):
        return _plans(run)
    if descended := steps(run):
        section = Section("Loss of the sub-models that were drawn", panels=False)
        section.text.append(
            f"{count(len(descended))} steps, each on its own piece of the calibration text; dots "
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
    return f"method {method} predicts nothing of sub-models."


def relevance_section(run: RunRecord) -> Section | str:
    """What units are worth, with error bars; or, in words, why that is not known."""
    if run.layout is not None and run.regressions:
        return _ranking(run, run.layout)
    if run.layout is not None and searched_rounds(run):
        return _probes(run)
    if costs := layer_costs(run):
        section = Section("What each layer is worth")
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
    return "it was not estimated from sub-models, so that there are no error bars."


def _regressions(run: RunRecord) -> Section:
    section = Section("Predicted and measured utility")
    section.text.append(
        "Every dot is a scored sub-model: the utility that a regression on other sub-models "
        "predicts for it, and the one that was measured. Dots of a perfect prediction lie on the "
        "dashed line."
    )
    table = Table(
        "Regressions, judged on sub-models that were held out",
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
        "Groups were thinned out one at a time to see what that costs. Every dot is a complete "
        "plan: what those costs add up to, if each grows with the square of the share that is "
        "taken, and the loss that was measured. Where the order differs, damage compounds over "
        "layers, and it was worth while to score plans instead of trusting the sum."
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
    section = Section("What each layer is worth")
    kinds = list(dict.fromkeys(probe.group.kind for probe in found))
    shares = ", ".join(
        f"{percent(next(p.fraction for p in found if p.group.kind == kind), 0)} of the "
        f"{KINDS[kind]}"
        for kind in kinds
    )
    section.text.append(
        f"What it cost the parent when one layer at a time lost {shares}, lowest prior first: "
        "divergence from the parent, in nats per token. Bars are one standard error over the "
        "calibration sequences."
    )
    table = Table(
        "Cost of thinning out each group, nats per token",
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
        f"What the parent loses with each unit, as {name} estimated it from whole sub-models: "
        f"{fit.quantity}. {count(known)} of {count(len(fit.relevance))} units varied and have an "
        "estimate. Bars are one standard error; where neighbours share a mark, it is their mean. "
        "Units that are still there in the end are blue, those that are gone orange."
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
        "Units of the largest and the smallest relevance",
        ("unit", "relevance", "standard error", "in the end"),
        [
            (
                unit_name(layout, place),
                significant(float(fit.relevance[place])),
                f"{PLUS_MINUS} {significant(float(fit.standard_error[place]), 2)}",
                "kept" if keep[place] else "gone",
            )
            for place in listed
        ],
    )
