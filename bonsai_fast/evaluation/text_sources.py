"""Read text: from files, from datasets on the hub, and the text that comes with Python."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Purpose = Literal["calibration", "evaluation"]

# more than any calibration needs; limits the time of tokenising
MAX_CHARACTERS = 20_000_000

# name -> (dataset, configuration, {purpose: split})
HUB_DATASETS = {
    "wikitext2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"calibration": "train", "evaluation": "test"},
    ),
    "c4": ("allenai/c4", "en", {"calibration": "train", "evaluation": "validation"}),
}
SOURCES = "wikitext2, c4, hf:NAME[:CONFIG], FILE.txt, FILE.jsonl, self or builtin"


def read_text(source: str, purpose: Purpose, num_tokens: int) -> str:
    """Read a text; of a large one, more than enough for `num_tokens` tokens.

    Args:
        source: one of SOURCES but "self".
        purpose: chooses the split of a dataset.
        num_tokens: that will be drawn from the text.
    Raises:
        ValueError: the text is missing or malformed, or the package that reads it is missing.
    """
    if source == "builtin":
        return builtin_text()
    if source in HUB_DATASETS:
        name, configuration, splits = HUB_DATASETS[source]
        return _read_hub(name, configuration, splits[purpose], num_tokens)
    if source.startswith("hf:"):
        name, _, configuration = source.removeprefix("hf:").partition(":")
        return _read_hub(name, configuration or None, "train", num_tokens)
    path = Path(source)
    readers: dict[str, Callable[[Path], str]] = {".txt": _read_plain, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise ValueError(f"{purpose} text: expected {SOURCES}, got {source!r}")
    if not path.is_file():
        raise ValueError(f"{purpose} text: no such file: {source}")
    try:
        return readers[path.suffix](path)[:MAX_CHARACTERS]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{purpose} text {source}: expected UTF-8, found byte {error.object[error.start]:#04x}"
        ) from error


def builtin_text() -> str:
    """Python's language reference, part of every installation: 465,000 characters of English."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _read_plain(path: Path) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read(MAX_CHARACTERS)


def _read_jsonl(path: Path) -> str:
    documents: list[str] = []
    total = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error.msg}") from error
            text = record.get("text") if isinstance(record, dict) else record
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: expected {{"text": "..."}} or a string')
            documents.append(text)
            total += len(text)
            if total > MAX_CHARACTERS:
                break
    return "\n\n".join(documents)


def _read_hub(name: str, configuration: str | None, split: str, num_tokens: int) -> str:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"reading the dataset {name} needs a package: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset {name}, split {split}, cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    # about four characters a token, and twice as many tokens as are drawn
    wanted = min(MAX_CHARACTERS, 8 * num_tokens)
    pieces: list[str] = []
    total = 0
    for row in rows:
        if "text" not in row:
            raise ValueError(f"dataset {name}: expected a column 'text', found {sorted(row)}")
        pieces.append(row["text"])
        total += len(row["text"])
        if total >= wanted:
            break
    return "\n\n".join(pieces)
