"""The model card: README.md of a saved model, with the metadata that the Hugging Face Hub reads.

Everything is read from the directory itself (configuration, weight files, `bonsai_report.json`) and
from the parent, if it is on this machine. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from bonsai_fast.checkpoints.saved_model import REPORT_NAME
from bonsai_fast.files import write_atomically
from bonsai_fast.surgery.loading_code import loading_code, needs_our_class
from bonsai_fast.surgery.model_size import KINDS, Widths, layer_widths, weight_size
from bonsai_fast.surgery.parent_card import CARD_NAME, TAG, Parent, find_parent

MEASURED = {"dense_perplexity", "pruned_perplexity", "protocol"}
# options of a run in its report -> their names in the card
OPTIONS = {
    "preset": "preset",
    "target_text": "target",
    "head_layout": "head layout",
    "round_to": "widths rounded to",
    "weight_update": "weight update",
    "seed": "seed",
}


def write_model_card(directory: Path, parent: str | None = None) -> None:
    """Write the card of a saved model, whole or not at all; an older one is replaced.

    Args:
        directory: of the model, with its configuration, weights and `bonsai_report.json`.
        parent: name or directory of what it was made from, if the report does not say.
    Raises:
        OSError: it cannot be written.
    """
    report = _json(directory / REPORT_NAME)
    source = Path(report.get("padded_from") or report.get("exported_from") or directory)
    if not source.is_dir():
        source = directory
    # an export is described by the pruned model that it was made from
    report = _json(source / REPORT_NAME) | report
    told = report.get("parent")
    name = (told.get("name") if isinstance(told, dict) else told) or parent
    found = find_parent(name) if name else Parent("")
    data = ModelCardData(
        base_model=found.hub_id,
        license=found.card.get("license"),
        license_name=found.card.get("license_name"),
        license_link=found.licence_link,
        language=found.card.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", TAG, *([report["method"]] if report.get("method") else [])],
    )
    paragraphs = (
        f"# {found.name}, pruned" if name else "# A pruned model",
        *_summary(report, found),
        *_sizes(directory, report, found),
        *_recovered(report),
        *_removed(source, report, found),
        *_loading(directory),
        *_licence(found),
    )
    text = "\n\n".join(paragraphs)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    write_atomically(directory / CARD_NAME, str(card).encode())


def record_measurements(directory: Path, measured: dict[str, Any]) -> None:
    """Add what was measured after saving to `bonsai_report.json` and to the card.

    Args:
        directory: of the saved model.
        measured: `parameters_dense`, `dense_perplexity`, `pruned_perplexity` and the `protocol` of
            both (`Perplexity.protocol`).
    Raises:
        OSError: a file cannot be written; each of the two is whole, new or old.
    """
    path = directory / REPORT_NAME
    text = json.dumps(_json(path) | {"measured": measured}, indent=2)
    write_atomically(path, f"{text}\n".encode())
    write_model_card(directory)


def _summary(report: dict[str, Any], parent: Parent) -> Iterator[str]:
    how = f", method `{report['method']}`" if report.get("method") else ""
    source = f" from {parent.link}" if parent.name else ""
    yield f"Made{source} by `bonsai_fast`{how}."
    options = [
        f"{label} `{report[name]}`"
        for name, label in OPTIONS.items()
        if report.get(name) is not None
    ]
    if options:
        yield f"Options: {', '.join(options)}."
    if "padded_from" in report:
        yield (
            "Every layer is padded with zeros to the widest one, so that the parent's own class "
            "loads it. It computes what the pruned model computes."
        )
    if "exported_from" in report:
        yield "It is in the layout of DeciLM (Nemotron-NAS), which vLLM runs."


def _sizes(directory: Path, report: dict[str, Any], parent: Parent) -> Iterator[str]:
    measured = report.get("measured", {})
    dense, dense_bytes = weight_size(parent.directory)
    parameters, num_bytes = weight_size(directory)
    dense = measured.get("parameters_dense", dense)
    rows = [
        ("", "parent", "this model"),
        ("---",) * 3,
        ("parameters", _count(dense), _count(parameters)),
        ("size of the weights", _megabytes(dense_bytes), _megabytes(num_bytes)),
    ]
    if measured.keys() >= MEASURED:
        values = (measured["dense_perplexity"], measured["pruned_perplexity"])
        rows.append(("perplexity", f"{values[0]:.2f}", f"{values[1]:.2f}"))
        if "recovery" in report:
            before = report["recovery"]["perplexity_before"]
            rows.append(("perplexity before recovery", "", f"{before:.2f}"))
    yield _table(rows)
    if measured.keys() >= MEASURED:
        protocol = measured["protocol"]
        yield (
            f"Perplexity on `{protocol['dataset']}`: {protocol['tokens']:,} predicted tokens, "
            f"windows of {protocol['window']} tokens, stride {protocol['stride']}; SHA-256 of the "
            f"tokens: `{protocol['sha256']}`."
        )


def _recovered(report: dict[str, Any]) -> Iterator[str]:
    """How the model was made better after pruning, if it was."""
    if "recovery" not in report:
        return
    yield "## How it was recovered"
    yield (
        f"After pruning, `{report['recovery']['recover']}`, with the parent as the teacher. Losses "
        "are on text that was held out from it."
    )
    yield _table(
        [
            ("tier", "text", "tokens", "loss before", "loss after"),
            ("---",) * 5,
            *(
                (
                    tier["name"],
                    tier["text"],
                    f"{tier['tokens']:,}",
                    f"{tier['held_out_before']:.4f}",
                    f"{tier['held_out_after']:.4f}",
                )
                for tier in report["recovery"]["tiers"]
            ),
        ]
    )


def _removed(directory: Path, report: dict[str, Any], parent: Parent) -> Iterator[str]:
    """What was removed: single weights, or heads and channels by layer."""
    if report.get("pattern"):
        yield "## What was removed"
        yield (
            "In the linear layers of the decoder, weights are zero by the pattern "
            f"`{report['pattern']}`. The zeros are stored: class, shapes and file size are the "
            "parent's."
        )
        return
    layers, dense = layer_widths(directory)
    if not layers:
        return
    if dense is None and parent.directory is not None:
        found = layer_widths(parent.directory)[0]
        dense = found if len(found) == len(layers) else None
    yield "## What was removed"
    everything = [*layers, *(dense or [])]
    shown = [n for n in range(len(KINDS)) if any(widths[n] is not None for widths in everything)]
    rows = [("layer", *(KINDS[n] for n in shown)), ("---",) * (1 + len(shown))]
    if dense is not None:
        totals = [
            (KINDS[n], *(sum(widths[n] or 0 for widths in each) for each in (layers, dense)))
            for n in shown
            if KINDS[n] != "channels in each expert"  # a width, which has no total
        ]
        kept = [f"{left:,} of {whole:,} {kind}" for kind, left, whole in totals if whole]
        yield f"Kept: {', '.join(kept)}."
        alike = len(set(dense)) == 1
        rows += [
            ("parent" if alike else f"parent, {where}", *(_width(widths[n]) for n in shown))
            for where, widths in _runs(dense)
        ]
    rows += [(where, *(_width(widths[n]) for n in shown)) for where, widths in _runs(layers)]
    yield _table(rows)


def _runs(layers: list[Widths]) -> Iterator[tuple[str, Widths]]:
    """Neighbouring layers that are alike: their numbers, and what each has."""
    first = 0
    for widths, run in groupby(layers):
        last = first + len(list(run)) - 1
        yield f"{first} to {last}" if last > first else f"{first}", widths
        first = last + 1


def _loading(directory: Path) -> Iterator[str]:
    yield "## How to load it"
    yield "In this directory; elsewhere, put its path or hub name in place of the dot:"
    yield f"```python\n{loading_code(directory)}\n```"
    if needs_our_class(_json(directory / "config.json")):
        yield (
            "Without `bonsai_fast`: leave out the first line and pass `trust_remote_code=True` to "
            "every `from_pretrained`. The Python files of the model's class are in this directory."
        )


def _licence(parent: Parent) -> Iterator[str]:
    yield "## Licence"
    name = parent.card.get("license_name") or parent.card.get("license")
    yield (
        f"The parent's: {name}."
        if name
        else "The parent's, which was not known where this model was saved: look it up before you "
        "share the model."
    )


def _json(path: Path) -> dict[str, Any]:
    """What a file of the directory says; empty if it is not there."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _width(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _megabytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1e6:,.1f} MB"
