"""Text for recovery: never what the evaluation reads, and held-out text that nothing else reads."""

from __future__ import annotations

import random
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from bonsai_fast.evaluation.recovery_text import recovery_text, training_sequences
from bonsai_fast.evaluation.text import (
    Sequences,
    calibration_sequences,
    calibration_tokens,
    evaluation_sequences,
)

TOKENIZER = byte_tokenizer()
# text that occurs nowhere
NONE = Sequences(torch.zeros(1, 64, dtype=torch.int64), "none", "none")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """4,096 random letters, so that each window of a few of them is another one."""
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(0).choices(ascii_lowercase, k=4096)))
    return str(path)


def calibration(source: str, count: int, length: int) -> Sequences:
    return calibration_sequences(source, TOKENIZER, num_sequences=count, length=length, seed=3)


def train_on(source: str, **options: object) -> Sequences:
    """`training_sequences` with a text for evaluation that is another one unless it is given."""
    return training_sequences(source, TOKENIZER, **{"evaluation": NONE, **options})  # type: ignore[arg-type]


def windows(sequences: Sequences, size: int = 16) -> set[bytes]:
    ids = sequences.input_ids.reshape(-1, size)
    return {row.numpy().tobytes() for row in ids}


def test_nothing_else_reads_what_is_held_out(text: str) -> None:
    drawn = calibration(text, 24, 64)
    found = recovery_text(drawn, TOKENIZER, evaluation=NONE, seed=3)
    assert found.is_apart and found.text is drawn
    assert found.held_out.input_ids.shape == ((3072 // 64 - 24) // 2, 64)
    train = train_on(text, tokens=10**6, length=32, seed=3, evaluation=NONE, apart_from=found)
    evaluation = evaluation_sequences(text, TOKENIZER, max_tokens=1024, length=64, calibration=text)
    sets = [windows(each) for each in (found.held_out, drawn, evaluation)]
    for place, one in enumerate(sets):
        for other in sets[:place]:
            assert not one & other
    assert not windows(train) & (sets[0] | sets[2])
    # all the rest, once
    assert train.input_ids.shape == (36 * 2, 32)
    assert windows(train) > windows(drawn)


def test_windows_of_other_lengths_do_not_touch_the_held_out_ones(text: str) -> None:
    found = recovery_text(calibration(text, 40, 48), TOKENIZER, evaluation=NONE, seed=3)
    train = train_on(text, tokens=10**6, length=80, seed=3, evaluation=NONE, apart_from=found)
    stream = calibration_tokens(text, TOKENIZER, 1)
    is_held_out = torch.zeros(len(stream), dtype=torch.bool)
    for place in range(0, len(stream) - 47, 48):
        window = stream[place : place + 48]
        if (found.held_out.input_ids == window).all(dim=1).any():
            is_held_out[place : place + 48] = True
    rows = {row.numpy().tobytes() for row in train.input_ids}
    for start in range(0, len(stream) - 79, 80):
        window = stream[start : start + 80].numpy().tobytes()
        assert (window in rows) == (not bool(is_held_out[start : start + 80].any()))


def test_a_short_text_holds_out_calibration_sequences(text: str) -> None:
    drawn = calibration(text, 48, 64)  # all of it
    found = recovery_text(drawn, TOKENIZER, evaluation=NONE, seed=3)
    assert not found.is_apart and len(found.held_out.input_ids) == 6
    both = torch.cat([found.held_out.input_ids, found.text.input_ids])
    assert torch.equal(both, drawn.input_ids)
    train = train_on(text, tokens=10**6, length=64, seed=3, evaluation=NONE, apart_from=found)
    assert not windows(train, 64) & windows(found.held_out, 64)
    with pytest.raises(ValueError, match="too short for recovery: expected 2 sequences"):
        recovery_text(calibration(text, 1, 3072), TOKENIZER, evaluation=NONE, seed=3)


def test_the_amount_that_is_asked_for(text: str) -> None:
    found = recovery_text(calibration(text, 4, 64), TOKENIZER, evaluation=NONE, seed=3)
    train = train_on(text, tokens=100, length=32, seed=3, evaluation=NONE, apart_from=found)
    assert train.input_ids.shape == (4, 32) and "4 random windows of 32" in train.description
    other = train_on(text, tokens=100, length=32, seed=4, evaluation=NONE, apart_from=found)
    assert not torch.equal(train.input_ids, other.input_ids)
    with pytest.raises(ValueError, match="at least 4096 tokens to train on"):
        train_on(text, tokens=9, length=4096, seed=0, evaluation=NONE, apart_from=found)


def test_evaluation_text_inside_is_not_drawn(text: str, tmp_path: Path) -> None:
    """The same text under another name, or a part of it, as data sets of the hub are read."""
    drawn = calibration(text, 8, 64)
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(text).read_text())
    evaluation = evaluation_sequences(
        str(copy), TOKENIZER, max_tokens=1024, length=128, calibration=text
    )
    found = recovery_text(drawn, TOKENIZER, evaluation=evaluation, seed=3)
    train = train_on(text, tokens=10**6, length=64, seed=3, evaluation=evaluation, apart_from=found)
    assert len(train.input_ids) == 3072 // 64 - 1024 // 64 - len(found.held_out.input_ids)
    assert not windows(evaluation, 64) & (windows(found.held_out, 64) | windows(train, 64))


def test_text_that_the_model_writes() -> None:
    model = tiny_llama()
    drawn = calibration_sequences(
        "self", TOKENIZER, num_sequences=2, length=64, seed=0, model=model
    )
    found = recovery_text(drawn, TOKENIZER, evaluation=NONE, seed=0, model=model)
    assert found.held_out.input_ids.shape == (128, 64)
    assert not windows(found.held_out, 64) & windows(drawn, 64)
    with pytest.raises(ValueError, match="recover_text: expected a text to train on, got self"):
        train_on("self", tokens=9, length=8, seed=0, evaluation=NONE, apart_from=found)
