"""Speeds, as measured by a run and by `bonsai_fast.latency`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bonsai_fast.report.number_format import (
    DTYPE_BYTES,
    PLUS_MINUS,
    count,
    decimal,
    percent,
    size,
    times,
)
from bonsai_fast.report.run_record import RunRecord

NEEDED = ("model", "batch", "prefill_tokens_per_s", "decode_tokens_per_s")
HEADER = (
    *("model", "batch", "prefill, tokens/s", PLUS_MINUS, "gain", "first token, ms"),
    *("decode, tokens/s", PLUS_MINUS, "gain", "memory"),
)


@dataclass(frozen=True)
class SpeedTable:
    """A table of speeds: the protocol, and one row per model in the order of HEADER."""

    protocol: str
    rows: list[tuple[str, ...]]


def of_run(run: RunRecord) -> SpeedTable | None:
    """The speeds that a run measured; None if it measured none."""
    speeds = run.result.get("latency")
    if not speeds:
        return None
    results = [{"model": name, "batch": 1, **speeds[name]} for name in sorted(speeds)]
    for result in results:
        result["peak_bytes"] = memory(run, result["model"])
    versions = run.manifest.get("versions", {})
    where = f"{run.manifest['parent']['device']} ({versions.get('machine', 'unknown')})"
    threads = {"threads": versions["threads"]} if "threads" in versions else {}
    return SpeedTable(_protocol({"device": where, **threads}, results), _rows(results))


def memory(run: RunRecord, model: str) -> int | None:
    """Bytes of weights, and of what a prompt and its decoding take at their peak; None if unknown.

    Args:
        model: "dense" or "pruned".
    """
    work = run.result.get("latency", {}).get(model, {}).get("work_bytes")
    width = DTYPE_BYTES.get(run.manifest["parent"]["dtype"])
    parameters = run.result.get("parameters_dense" if model == "dense" else "parameters")
    if work is None or width is None or parameters is None:
        return None
    return int(work + width * parameters)


def of_command(found: dict[str, Any]) -> SpeedTable:
    """The table of what `read_latency` returned."""
    return SpeedTable(_protocol(found, found["results"]), _rows(found["results"]))


def read_latency(path: Path) -> dict[str, Any]:
    """Read the latency command's output: its JSON alone, or all of its stdout.

    Raises:
        ValueError: something else.
        OSError: the file cannot be read.
    """
    lines = path.read_text(errors="replace").strip().splitlines()
    expected = f"{path}: expected what bonsai_fast.latency prints"
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        try:
            found = json.loads("\n".join(lines))
        except ValueError as error:
            raise ValueError(f"{expected}: no JSON in its last line") from error
    results = found.get("results") if isinstance(found, dict) else None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"{expected}: no list of results in it")
    for result in results:
        missing = [name for name in NEEDED if name not in result]
        if missing:
            raise ValueError(f"{expected}: a result lacks {missing[0]}")
    return dict(found)


def _rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            str(result["model"]),
            count(int(result["batch"])),
            decimal(result["prefill_tokens_per_s"], 1),
            _if_known(result.get("prefill_spread"), lambda share: percent(share, 0)),
            _if_known(result.get("prefill_speedup"), times),
            _if_known(result.get("time_to_first_token_s"), lambda s: decimal(1e3 * s, 1)),
            decimal(result["decode_tokens_per_s"], 1),
            _if_known(result.get("decode_spread"), lambda share: percent(share, 0)),
            _if_known(result.get("decode_speedup"), times),
            _if_known(result.get("peak_bytes"), size),
        )
        for result in results
    ]


def _protocol(about: dict[str, Any], results: list[dict[str, Any]]) -> str:
    said = [f"{name} {about[name]}" for name in ("device", "threads", "rounds") if name in about]
    first = results[0] if results else {}
    for name, words in (("prefill_tokens", "prompt"), ("decode_tokens", "new tokens")):
        if name in first:
            said.append(f"{words} {count(first[name])}")
    return ", ".join(said)


def _if_known(value: float | None, write: Callable[[float], str]) -> str:
    return "" if value is None else write(value)
