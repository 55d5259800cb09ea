"""Text for recovery: never what the evaluation reads, and held-out text that nothing else reads."""

from __future__ import annotations

from pathlib import Path

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


@pytest.fixture
def text(tmp_path: Path) -> str:
    """4,096 bytes, so that each window of a few of them is another one."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(97 + (n * n // 7 + n // 5) % 26 for n in range(4096)))
    return str(path)


def calibration(source: str, count: int, length: int) -> Sequences:
    return calibration_sequences(source, TOKENIZER, num_sequences=count, length=length, seed=3)


def windows(sequences: Sequences, size: int = 16) -> set[bytes]:
    ids = sequences.input_ids.reshape(-1, size)
    return {row.numpy().tobytes() for row in ids}


def test_nothing_else_reads_what_is_held_out(text: str) -> None:
    drawn = calibration(text, 24, 64)
    found = recovery_text(drawn, TOKENIZER, seed=3)
    assert found.is_apart and found.text is drawn
    assert found.held_out.input_ids.shape == ((3072 // 64 - 24) // 2, 64)
    train = training_sequences(text, TOKENIZER, tokens=10**6, length=32, seed=3, apart_from=found)
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
    found = recovery_text(calibration(text, 40, 48), TOKENIZER, seed=3)
    train = training_sequences(text, TOKENIZER, tokens=10**6, length=80, seed=3, apart_from=found)
    stream = calibration_tokens(text, TOKENIZER, 1)
    is_held_out = torch.zeros(len(stream), dtype=torch.bool)
    for place in found.places.tolist():
        is_held_out[place * 48 : place * 48 + 48] = True
    rows = {row.numpy().tobytes() for row in train.input_ids}
    for start in range(0, len(stream) - 79, 80):
        window = stream[start : start + 80].numpy().tobytes()
        assert (window in rows) == (not bool(is_held_out[start : start + 80].any()))


def test_a_short_text_holds_out_calibration_sequences(text: str) -> None:
    drawn = calibration(text, 48, 64)  # all of it
    found = recovery_text(drawn, TOKENIZER, seed=3)
    assert not found.is_apart and len(found.held_out.input_ids) == 6
    both = torch.cat([found.held_out.input_ids, found.text.input_ids])
    assert torch.equal(both, drawn.input_ids)
    train = training_sequences(text, TOKENIZER, tokens=10**6, length=64, seed=3, apart_from=found)
    assert not windows(train, 64) & windows(found.held_out, 64)
    with pytest.raises(ValueError, match="too short for recovery: expected 2 sequences"):
        recovery_text(calibration(text, 1, 3072), TOKENIZER, seed=3)


def test_the_amount_that_is_asked_for(text: str) -> None:
    found = recovery_text(calibration(text, 4, 64), TOKENIZER, seed=3)
    train = training_sequences(text, TOKENIZER, tokens=100, length=32, seed=3, apart_from=found)
    assert train.input_ids.shape == (4, 32) and "4 random windows of 32" in train.description
    other = training_sequences(text, TOKENIZER, tokens=100, length=32, seed=4, apart_from=found)
    assert not torch.equal(train.input_ids, other.input_ids)
    with pytest.raises(ValueError, match="at least 4096 tokens to train on"):
        training_sequences(text, TOKENIZER, tokens=9, length=4096, seed=0, apart_from=found)


def test_text_that_the_model_writes() -> None:
    model = tiny_llama()
    drawn = calibration_sequences(
        "self", TOKENIZER, num_sequences=2, length=64, seed=0, model=model
    )
    found = recovery_text(drawn, TOKENIZER, seed=0, model=model)
    assert found.held_out.input_ids.shape == (128, 64)
    assert not windows(found.held_out, 64) & windows(drawn, 64)
    with pytest.raises(ValueError, match="recover_text: expected a text to train on, got self"):
        training_sequences("self", TOKENIZER, tokens=9, length=8, seed=0, apart_from=found)
