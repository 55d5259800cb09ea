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


@dataclass(frozen=True, eq=False)
class RecoveryText:
    """The calibration text as recovery reads it.

    Attributes:
        text: calibration sequences.
        held_out: others of the same length, from the part of the text that evaluation does not
            read.
        places: numbers of the held-out windows, int64; empty if they are no windows of the text.
        is_apart: whether the search read none of the held-out sequences.
    """

    text: Sequences
    held_out: Sequences
    places: torch.Tensor
    is_apart: bool = True


def recovery_text(
    calibration: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    model: PreTrainedModel | None = None,
) -> RecoveryText:
    """Set text aside that neither the search nor recovery nor the evaluation reads.

    If the text is too short for that, some calibration sequences are held out from recovery.

    Args:
        calibration: what `calibration_sequences` drew with the same tokenizer and seed.
        tokenizer, seed: those arguments.
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
        return RecoveryText(calibration, Sequences(sampled, source, words), torch.tensor([]))
    windows = in_windows(calibration_tokens(source, tokenizer, count * length), length)
    is_free = torch.ones(len(windows), dtype=torch.bool)
    is_free[draw(len(windows), count, seed)] = False
    free = is_free.nonzero().flatten()
    if len(free):
        # training gets the other half of a short text
        places = free[draw(len(free), min(wanted, -(-len(free) // 2)), seed + 1)]
        words = f"{len(places)} other windows of {length} tokens, seed {seed + 1}"
        return RecoveryText(calibration, Sequences(windows[places], source, words), places)
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
        torch.arange(held_out),
        is_apart=False,
    )


def training_sequences(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int,
    apart_from: RecoveryText,
) -> Sequences:
    """Random windows of the first three quarters of a text, without those that are held out.

    Args:
        source: one of SOURCES but "self".
        tokenizer: the model's tokenizer.
        tokens: how many to draw; a shorter text gives all that it has.
        length: tokens in each window.
        seed: which are drawn.
        apart_from: holds the text that is held out.
    Raises:
        ValueError: the text is missing or does not hold one window.
    """
    if source == "self":
        raise ValueError(
            "recover_text: expected a text to train on, got self; name a file or a data set"
        )
    stream = calibration_tokens(source, tokenizer, tokens)
    windows = in_windows(stream, length)
    is_free = torch.ones(len(windows), dtype=torch.bool)
    held_out = apart_from.held_out
    if held_out.source == source:
        width = held_out.input_ids.shape[1]
        for place in apart_from.places.tolist():
            is_free[place * width // length : -(-(place + 1) * width // length)] = False
    free = is_free.nonzero().flatten()
    if not len(free):
        raise ValueError(
            f"recover_text: expected at least {length} tokens to train on in the first three "
            f"quarters of {source!r}, beside those that are held out; got {len(stream)} in all"
        )
    count = min(len(free), -(-tokens // length))
    words = f"{count} random windows of {length} tokens, seed {seed}"
    return Sequences(windows[free[draw(len(free), count, seed)]], source, words)
