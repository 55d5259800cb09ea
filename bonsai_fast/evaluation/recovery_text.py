"""Text for recovery: what it trains on, and other text that says whether it helped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.evaluation.text import (
    Sequences,
    calibration_tokens,
    draw,
    in_windows,
    sample_text,
)

# held out from recovery, at most
HELD_OUT_TOKENS = 8192
# of the calibration sequences, where the text holds no other
HELD_OUT_SHARE = 8
# as many equal tokens are the same place of a text
SAME_TOKENS = 32


@dataclass(frozen=True, eq=False)
class RecoveryText:
    """The calibration text as recovery reads it.

    Attributes:
        text: calibration sequences.
        held_out: others of the same length, from the part of the text that evaluation does not
            read.
        is_apart: whether the search read none of the held-out sequences.
    """

    text: Sequences
    held_out: Sequences
    is_apart: bool = True


def recovery_text(
    calibration: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    *,
    evaluation: Sequences,
    seed: int,
    model: PreTrainedModel | None = None,
) -> RecoveryText:
    """Set text aside that neither the search nor recovery nor the evaluation reads.

    If the text is too short for that, some calibration sequences are held out from recovery.

    Args:
        calibration: what `calibration_sequences` drew with the same tokenizer and seed.
        tokenizer, seed: those arguments.
        evaluation: text that results are measured on.
        model: as there, for source "self".
    Raises:
        ValueError: the text is missing, or there is a single sequence of it.
    """
    count, length = calibration.input_ids.shape
    wanted = max(1, HELD_OUT_TOKENS // length)
    source = calibration.source
    if source == "self":
        assert model is not None
        sampled = sample_text(model, num_sequences=wanted, length=length, seed=seed + 1)
        words = f"{wanted} x {length} tokens sampled from the parent, seed {seed + 1}"
        return RecoveryText(calibration, Sequences(sampled, source, words))
    stream = calibration_tokens(source, tokenizer, count * length)
    windows = in_windows(stream, length)
    is_free = ~in_windows(places_of(evaluation, stream), length).any(dim=1)
    is_free[draw(len(windows), count, seed)] = False
    free = is_free.nonzero().flatten()
    if len(free):
        # training gets the other half of a short text
        places = free[draw(len(free), min(wanted, -(-len(free) // 2)), seed + 1)]
        words = f"{len(places)} other windows of {length} tokens, seed {seed + 1}"
        return RecoveryText(calibration, Sequences(windows[places], source, words))
    if count < 2:
        raise ValueError(
            f"calibration text {source!r} is too short for recovery: expected 2 sequences of "
            f"{length} tokens, one of them held out, got 1; give more text, or recover=none"
        )
    held_out = min(wanted, -(-count // HELD_OUT_SHARE))
    ids, words = calibration.input_ids, calibration.description
    return RecoveryText(
        Sequences(ids[held_out:], source, f"{count - held_out} of {words}"),
        Sequences(ids[:held_out], source, f"{held_out} of {words}"),
        is_apart=False,
    )


def training_sequences(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int,
    evaluation: Sequences,
    apart_from: RecoveryText,
) -> Sequences:
    """Random windows of the first three quarters of a text, without what else is measured on.

    Args:
        source: one of SOURCES but "self".
        tokenizer: the model's tokenizer.
        tokens: how many to draw; a shorter text gives all that it has.
        length: tokens in each window.
        seed: which are drawn.
        evaluation: text that results are measured on; where it occurs, nothing is drawn.
        apart_from: holds the text that is held out; likewise.
    Raises:
        ValueError: the text is missing or does not hold one window.
    """
    if source == "self":
        raise ValueError(
            "recover_text: expected a text to train on, got self; name a file or a data set"
        )
    stream = calibration_tokens(source, tokenizer, tokens)
    windows = in_windows(stream, length)
    taken = places_of(evaluation, stream) | places_of(apart_from.held_out, stream)
    is_free = ~in_windows(taken, length).any(dim=1)
    free = is_free.nonzero().flatten()
    if not len(free):
        raise ValueError(
            f"recover_text: expected at least {length} tokens to train on in the first three "
            f"quarters of {source!r}, beside those that are held out; got {len(stream)} in all"
        )
    count = min(len(free), -(-tokens // length))
    words = f"{count} random windows of {length} tokens, seed {seed}"
    return Sequences(windows[free[draw(len(free), count, seed)]], source, words)


def places_of(sequences: Sequences, stream: torch.Tensor) -> torch.Tensor:
    """Where sequences occur in a text.

    Args:
        sequences: int64 [B, T].
        stream: tokens of the text, int64 [N].
    Returns:
        bool [N], True inside an occurrence.
    """
    found = torch.zeros(len(stream), dtype=torch.bool)
    for row in sequences.input_ids:
        length = min(len(row), SAME_TOKENS)
        places = (stream == row[0]).nonzero().flatten()
        places = places[places <= len(stream) - length]
        for offset in range(1, length):
            places = places[stream[places + offset] == row[offset]]
        for place in places.tolist():
            found[place : place + len(row)] = True
    return found
