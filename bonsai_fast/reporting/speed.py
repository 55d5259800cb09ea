"""Speeds as a run measured them, and as `bonsai_fast.latency` did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bonsai_fast.reporting.words import count, decimal, size, times

NEEDED = ("model", "batch", "prefill_tokens_per_s", "decode_tokens_per_s")
HEADER = (
    *("model", "batch", "prefill, tokens/s", "", "first token, ms", "decode, tokens/s", ""),
    "peak memory",
)


def read_latency(path: Path) -> dict[str, Any]:
    """What the command printed: its JSON alone, or all of its stdout.

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


def latency_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of each result, in the order of HEADER."""
    return [
        (
            str(result["model"]),
            count(int(result["batch"])),
            decimal(result["prefill_tokens_per_s"], 1),
            _speedup(result, "prefill"),
            _milliseconds(result.get("time_to_first_token_s")),
            decimal(result["decode_tokens_per_s"], 1),
            _speedup(result, "decode"),
            "" if result.get("peak_bytes") is None else size(result["peak_bytes"]),
        )
        for result in found["results"]
    ]


def latency_protocol(found: dict[str, Any]) -> str:
    """How it was measured, as far as the file says."""
    said = [f"{name} {found[name]}" for name in ("device", "threads", "rounds") if name in found]
    first = found["results"][0] if found["results"] else {}
    for name, words in (("prefill_tokens", "prompt"), ("decode_tokens", "new tokens")):
        if name in first:
            said.append(f"{words} {count(first[name])}")
    return ", ".join(said)


def _speedup(result: dict[str, Any], phase: str) -> str:
    value = result.get(f"{phase}_speedup")
    return "" if value is None else times(value)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else decimal(1e3 * seconds, 1)
