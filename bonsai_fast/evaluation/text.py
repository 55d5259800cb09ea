"""Text for calibration and evaluation, as token sequences of one length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.evaluation.text_sources import HUB_DATASETS, Purpose, read_text

# one text may serve both purposes: calibration reads its first part, evaluation the rest
HELD_OUT_FRACTION = 0.25
# windows for calibration and for evaluation are no longer than these unless requested
MAX_LENGTH, EVALUATION_LENGTH = 4096, 512


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences of one length, and their source.

    Attributes:
        input_ids: int64 [B, T].
        source: the text, as the user named it.
        description: which tokens of that text these are, in words.
        sha256: `tokens_sha256` of the sequences.
    """

    input_ids: torch.Tensor
    source: str
    description: str

    @property
    def sha256(self) -> str:
        return tokens_sha256(self.input_ids)


# Runs record two hashes of a text: of its tokens in run.json, of tokens and shape in the ledger.
# Neither may change, or runs of earlier versions could not be resumed.


def tokens_sha256(input_ids: torch.Tensor, prefix: bytes = b"") -> str:
    """SHA-256 of token ids, int64 [B, T], row by row: 64 hexadecimal digits."""
    return hashlib.sha256(prefix + input_ids.contiguous().numpy().tobytes()).hexdigest()


def ledger_key(input_ids: torch.Tensor) -> str:
    """The key of a text in a ledger: 32 hexadecimal digits that depend on the shape [B, T], too."""
    return tokens_sha256(input_ids, str(tuple(input_ids.shape)).encode())[:32]


def longest_window(model: PreTrainedModel) -> int:
    """Tokens in a window of text, unless the request says otherwise."""
    return min(int(getattr(model.config, "max_position_embeddings", MAX_LENGTH)), MAX_LENGTH)


def calibration_sequences(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    length: int,
    seed: int,
    model: PreTrainedModel | None = None,
) -> Sequences:
    """Draw sequences at random from the first three quarters of a text; they do not overlap.

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
    tokens = calibration_tokens(source, tokenizer, num_sequences * length)
    windows = in_windows(tokens, length)
    if len(windows) < num_sequences:
        raise ValueError(
            f"calibration text {source!r} is too short: expected at least "
            f"{num_sequences} x {length} tokens in its first {1 - HELD_OUT_FRACTION:.0%}, "
            f"got {len(tokens)}"
        )
    chosen = draw(len(windows), num_sequences, seed)
    return Sequences(
        windows[chosen], source, f"{num_sequences} random windows of {length} tokens, seed {seed}"
    )


def calibration_tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> torch.Tensor:
    """The first three quarters of a text, int64 [N]: what evaluation on it does not read.

    Args:
        source: one of SOURCES but "self".
        tokenizer: the model's tokenizer.
        num_tokens: how many will be drawn; of a large text, no more than needed for them is read.
    Raises:
        ValueError: the text is missing or empty, or the package that reads it is missing.
    """
    tokens = _tokenize(source, "calibration", tokenizer, num_tokens)
    return tokens[: len(tokens) - int(HELD_OUT_FRACTION * len(tokens))]


def in_windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Consecutive windows without the rest at the end: [N] -> [N // length, length]."""
    windows = len(tokens) // length
    return tokens[: windows * length].view(windows, length)


def draw(windows: int, count: int, seed: int) -> torch.Tensor:
    """Numbers of `count` different windows at random, in order: int64 [count]."""
    chosen = np.random.default_rng(seed).choice(windows, count, replace=False)
    return torch.from_numpy(np.sort(chosen))


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
        source: one of SOURCES but "self". If it is also the calibration text, its last quarter is
            read, which calibration does not use.
        tokenizer: the model's tokenizer.
        max_tokens: limit on the number of tokens; sequences of `length` are whole.
        length: T of the result.
        calibration: the source that calibration used.
    Raises:
        ValueError: as for `calibration_sequences`.
    """
    if source == "self":
        raise ValueError(
            "evaluation: expected another source than self; "
            "text that the model wrote does not test it"
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
    """Sample text at temperature 1, starting from the BOS or EOS token: int64 [B, T]."""
    config = model.generation_config
    first = config.bos_token_id if config.bos_token_id is not None else model.config.eos_token_id
    if first is None:
        raise ValueError(
            "calibration 'self': expected a model with a bos_token_id or eos_token_id to start "
            "from, got neither"
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
    source: str, purpose: Purpose, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> torch.Tensor:
    text = read_text(source, purpose, num_tokens)
    if not text.strip():
        raise ValueError(f"{purpose} text {source!r} is empty")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
