"""Text for calibration and evaluation, as token sequences of one length."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# one text may serve both purposes: calibration reads its first part, evaluation the rest
HELD_OUT_FRACTION = 0.25
# enough for any number of sequences in use, and bounds the time that tokenising takes
MAX_CHARACTERS = 20_000_000

# name -> (dataset, configuration, {purpose: split}, column)
HUB_DATASETS = {
    "wikitext2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"calibration": "train", "evaluation": "test"},
    ),
    "c4": ("allenai/c4", "en", {"calibration": "train", "evaluation": "validation"}),
}
SOURCES = "wikitext2, c4, hf:NAME[:CONFIG], FILE.txt, FILE.jsonl, self or builtin"


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences of one length and where they came from.

    Attributes:
        input_ids: int64 [B, T].
        source: what the user named.
        description: which tokens of that text these are, in words.
        sha256: `tokens_sha256` of the sequences.
    """

    input_ids: torch.Tensor
    source: str
    description: str

    @property
    def sha256(self) -> str:
        return tokens_sha256(self.input_ids)


# A run records a text in two forms, so both stay as they are: its tokens in run.json, where people
# compare them with other tools, and tokens with their shape in each entry of the ledger.


def tokens_sha256(input_ids: torch.Tensor, prefix: bytes = b"") -> str:
    """SHA-256 of token ids, int64 [B, T], row by row: 64 hexadecimal digits."""
    return hashlib.sha256(prefix + input_ids.contiguous().numpy().tobytes()).hexdigest()


def ledger_key(input_ids: torch.Tensor) -> str:
    """What a ledger files a text under: 32 hexadecimal digits, other ones for another [B, T]."""
    return tokens_sha256(input_ids, str(tuple(input_ids.shape)).encode())[:32]


def calibration_sequences(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    length: int,
    seed: int,
    model: PreTrainedModel | None = None,
) -> Sequences:
    """Draw sequences that do not overlap, at random places of the first three quarters of a text.

    Args:
        source: one of SOURCES.
        tokenizer: the model's tokenizer.
        num_sequences, length: B and T of the result.
        seed: which sequences are drawn.
        model: needed for source "self", text sampled from the model itself.
    Raises:
        ValueError: the text is missing, empty or too short, or the package that reads it is
            missing.
    """
    if source == "self":
        if model is None:
            raise ValueError("calibration 'self' needs the model that the text is sampled from")
        sampled = sample_text(model, num_sequences=num_sequences, length=length, seed=seed)
        return Sequences(
            sampled,
            source,
            f"{num_sequences} x {length} tokens sampled from the parent, seed {seed}",
        )
    tokens = _tokenize(source, "calibration", tokenizer, num_sequences * length)
    tokens = tokens[: len(tokens) - int(HELD_OUT_FRACTION * len(tokens))]
    windows = len(tokens) // length
    if windows < num_sequences:
        raise ValueError(
            f"calibration text {source!r} is too short: expected at least "
            f"{num_sequences} x {length} tokens in its first {1 - HELD_OUT_FRACTION:.0%}, "
            f"got {len(tokens)}"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(windows, num_sequences, replace=False))
    input_ids = tokens[: windows * length].view(windows, length)[torch.from_numpy(chosen)]
    return Sequences(
        input_ids, source, f"{num_sequences} random windows of {length} tokens, seed {seed}"
    )


def evaluation_sequences(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    length: int,
    calibration: str,
) -> Sequences:
    """Consecutive sequences of a text that was not used for calibration.

    Args:
        source: one of SOURCES but "self". The same text as `calibration` is read from where
            calibration stops.
        tokenizer: the model's tokenizer.
        max_tokens: at most that many tokens, in whole sequences of `length`.
        calibration: the source that calibration used.
    Raises:
        ValueError: as `calibration_sequences`.
    """
    if source == "self":
        raise ValueError(
            "evaluation: text sampled from the model says nothing about it; expected another source"
        )
    held_out = source == calibration and source not in HUB_DATASETS
    tokens = _tokenize(source, "evaluation", tokenizer, max_tokens)
    start = len(tokens) - int(HELD_OUT_FRACTION * len(tokens)) if held_out else 0
    windows = min(len(tokens) - start, max_tokens) // length
    if windows < 1:
        place = f" in its last {HELD_OUT_FRACTION:.0%}" if held_out else ""
        raise ValueError(
            f"evaluation text {source!r} is too short: expected at least {length} tokens{place}, "
            f"got {len(tokens) - start}"
        )
    input_ids = tokens[start : start + windows * length].view(windows, length)
    return Sequences(
        input_ids,
        source,
        f"tokens {start} to {start + windows * length}, windows of {length}, no overlap",
    )


@torch.inference_mode()
def sample_text(
    model: PreTrainedModel, *, num_sequences: int, length: int, seed: int
) -> torch.Tensor:
    """Text sampled from a model at temperature 1 from its first token on: int64 [B, T]."""
    config = model.generation_config
    first = config.bos_token_id if config.bos_token_id is not None else model.config.eos_token_id
    if first is None:
        raise ValueError(
            "calibration 'self': the model names no token to begin with "
            "(bos_token_id or eos_token_id)"
        )
    start = torch.full(
        (num_sequences, 1), first if isinstance(first, int) else first[0], device=model.device
    )
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        sampled: torch.Tensor = cast(Any, model).generate(
            start,
            attention_mask=torch.ones_like(start),
            min_new_tokens=length,
            max_new_tokens=length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
    return sampled[:, 1:].cpu()


def _tokenize(
    source: str, purpose: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> torch.Tensor:
    text = _read(source, purpose, num_tokens)
    if not text.strip():
        raise ValueError(f"{purpose} text {source!r} is empty")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _read(source: str, purpose: str, num_tokens: int) -> str:
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
    """The language reference that every Python carries: English prose, about 465,000 characters."""
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
    # about four characters a token, and twice that to draw from
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
