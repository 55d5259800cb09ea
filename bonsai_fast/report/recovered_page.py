"""The page of a saved model that was recovered."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from bonsai_fast.files import write_atomically
from bonsai_fast.report.headline import Row
from bonsai_fast.report.number_format import count, decimal, less, percent, times
from bonsai_fast.report.page import FILE, template
from bonsai_fast.report.recovery_section import recovery_section
from bonsai_fast.report.run_record import read_json
from bonsai_fast.runs.identity import RECOVER_MANIFEST


def write_recovered_report(directory: Path, output: Path | None = None) -> Path:
    """Read the directory of a finished recovery and write its page, whole or not at all.

    Args:
        directory: what the command `recover` wrote.
        output: the page; DIRECTORY/report.html if None.
    Returns:
        where the page is.
    Raises:
        ValueError: not such a directory, or not finished.
        OSError: a file cannot be read or written.
    """
    record = read_json(directory / RECOVER_MANIFEST, "a directory of bonsai-fast recover")
    if record.get("status") != "finished":
        raise ValueError(f"{directory} is not finished: run its command again to resume")
    result, target = record["result"], output or directory / FILE
    dense, after = result["dense_perplexity"], result["pruned_perplexity"]
    page = template("recovered.html").render(
        title=f"{_name(record['student'])}, recovered",
        lead=_lead(record),
        rows=_rows(result),
        result=result,
        record=record,
        recovery=recovery_section(result["recovery"], dense, after),
    )
    write_atomically(target, page.encode())
    return target


def _name(model: dict[str, Any]) -> str:
    """A model without the folders above it; of a run, the run's name."""
    path = PurePath(str(model["name"]))
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    return name or "a pruned model"


def _lead(record: dict[str, Any]) -> list[str]:
    result = record["result"]
    before, after = result["recovery"]["perplexity_before"], result["pruned_perplexity"]
    dense = result["dense_perplexity"]
    return [
        f"A pruned {_name(record['parent'])}. Its perplexity on text that chose nothing was "
        f"{decimal(before)} and is {decimal(after)} after {record['request']['recover']}; the "
        f"parent's is {decimal(dense)} ({times(after / dense)})."
    ]


def _rows(result: dict[str, Any]) -> list[Row]:
    dense, after = result["dense_perplexity"], result["pruned_perplexity"]
    before = result["recovery"]["perplexity_before"]
    parameters = count(result["parameters_dense"]), count(result["parameters"])
    rows = [
        Row("perplexity", decimal(dense), decimal(after), times(after / dense)),
        Row("before recovery", "", decimal(before), times(before / dense)),
        Row("parameters", *parameters, less(result["sparsity_total"])),
    ]
    if result["zeros"]:
        rows.append(Row("zeros in the decoder", "", percent(result["zeros"]), ""))
    return rows
