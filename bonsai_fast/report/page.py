"""The page: its sections and their template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from bonsai_fast.files import write_atomically
from bonsai_fast.methods import WEIGHT_METHODS
from bonsai_fast.report import headline, speed
from bonsai_fast.report import number_format as words
from bonsai_fast.report.chart import DARK, LIGHT
from bonsai_fast.report.figures import channel_bar, head_cells, trajectory
from bonsai_fast.report.kept_by_layer import layer_rows
from bonsai_fast.report.recovery_section import recovery_section
from bonsai_fast.report.reproduce import command_line, recorded_config
from bonsai_fast.report.run_record import RunRecord
from bonsai_fast.report.search_section import Section, relevance_section, search_section

FILE = "report.html"


@dataclass(frozen=True)
class LeftOut:
    """A section that is left out, and why."""

    section: str
    why: str


def write_report(run: Path, output: Path | None = None, latency: Path | None = None) -> Path:
    """Read a run directory and write its report, whole or not at all.

    Args:
        run: the run's directory, finished or not.
        output: the page; RUN/report.html if None.
        latency: what `bonsai_fast.latency` printed, to be shown too.
    Returns:
        where the page is.
    Raises:
        ValueError: not a run, or a file is not what it should be.
        OSError: a file cannot be read or written.
    """
    target = run / FILE if output is None else output
    found = None if latency is None else speed.read_latency(latency)
    write_atomically(target, render(RunRecord.read(run), found).encode())
    return target


def render(run: RunRecord, latency: dict[str, Any] | None = None) -> str:
    """The page as text; it refers to nothing outside itself.

    Args:
        latency: as `speed.read_latency` returns it.
    """
    return template("report.html").render(**content(run, latency))


def template(name: str) -> Template:
    """A page of the folder templates."""
    environment = Environment(
        loader=PackageLoader("bonsai_fast.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = ("count", "percent", "size", "decimal", "duration")
    environment.filters.update({name: getattr(words, name) for name in filters})
    environment.globals.update(
        light=Markup(LIGHT.style()),
        dark=Markup(DARK.style()),
        themes={"light": LIGHT, "dark": DARK},
    )
    return environment.get_template(name)


def content(run: RunRecord, latency: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that the template asks for."""
    left_out: list[LeftOut] = []
    config = recorded_config(run.manifest)

    def or_left_out(section: Section | str, name: str) -> Section | None:
        if isinstance(section, str):
            left_out.append(LeftOut(name, section))
            return None
        return section

    search = or_left_out(search_section(run), "Predicted and measured")
    relevance = or_left_out(relevance_section(run), "Relevance")
    recovery = or_left_out(_recovery(run), "Recovery")
    rounds = _rounds(run, left_out)
    kept = _kept(run, left_out)
    if not run.completions:
        left_out.append(LeftOut("Completions", "no completions were recorded."))
    return {
        "title": headline.title(run),
        "lead": headline.lead(run),
        "finished": run.finished,
        "rows": headline.rows(run),
        "facts": headline.facts(run),
        "warnings": run.result.get("warnings", []),
        "result": run.result,
        "method": config.method,
        "preset": config.preset,
        "config": config,
        "rounds": rounds,
        "recovery": recovery,
        "kept": kept,
        "search": search,
        "relevance": relevance,
        "speed_header": speed.HEADER,
        "speed": speed.of_run(run),
        "other_speed": None if latency is None else speed.of_command(latency),
        "completions": run.completions,
        "manifest": run.manifest,
        "command": command_line(run.manifest),
        "settings": {
            name: value for name, value in config.values_read().items() if value is not None
        },
        "left_out": left_out,
    }


def _rounds(run: RunRecord, left_out: list[LeftOut]) -> dict[str, Any] | None:
    result = run.result
    if not result:
        why = "it is measured when a run ends."
    elif "zeros" in result:
        why = "weights are zeroed layer by layer, without rounds."
    elif not result.get("rounds"):
        why = "there was no intermediate round; the first table has both models."
    else:
        points = [("dense", 0.0, result["dense_perplexity"])]
        points += [(r["name"], r["sparsity"], r["perplexity"]) for r in result["rounds"]]
        if result.get("recovery"):
            before = result["recovery"]["perplexity_before"]
            points.append(("before recovery", result["sparsity"], before))
        points += [("saved", result["sparsity"], result["pruned_perplexity"])]
        figure = trajectory(points)
        return {"figure": figure and Markup(figure), "points": points}
    left_out.append(LeftOut("Perplexity over the rounds", why))
    return None


def _recovery(run: RunRecord) -> Section | str:
    """What recovery did; or, as text, why there is nothing to show."""
    result = run.result
    if not result:
        return "it follows pruning."
    recovery = result.get("recovery")
    if not recovery:
        return "the model was saved as it was pruned."
    return recovery_section(recovery, result["dense_perplexity"], result["pruned_perplexity"])


def _kept(run: RunRecord, left_out: list[LeftOut]) -> dict[str, Any] | None:
    found = run.kept
    if run.layout is None or found is None:
        why = "no round has been recorded yet."
        if run.manifest["config"]["method"] in WEIGHT_METHODS:
            why = "single weights were zeroed; every layer keeps its shape."
        left_out.append(LeftOut("What each layer keeps", why))
        return None
    name, mask = found
    rows = layer_rows(run.layout, mask.keep)
    return {
        "name": name,
        "sparsity": mask.removed / run.layout.num_decoder_parameters,
        "rows": [(row, Markup(head_cells(row)), Markup(channel_bar(row))) for row in rows],
        "heads_kept": sum(row.heads_kept for row in rows),
        "heads": sum(len(row.heads) for row in rows),
        "kv_groups_kept": sum(row.kv_groups_kept for row in rows),
        "kv_groups": sum(row.kv_groups for row in rows),
        "channels_kept": sum(row.channels_kept for row in rows if not row.is_mixture),
        "channels": sum(row.channels for row in rows if not row.is_mixture),
        "experts_kept": sum(row.channels_kept for row in rows if row.is_mixture),
        "experts": sum(row.channels for row in rows if row.is_mixture),
    }
