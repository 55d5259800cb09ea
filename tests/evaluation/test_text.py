"""Calibration and evaluation text: where it comes from, and that the one never sees the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from bonsai_fast.evaluation.text import (
    calibration_sequences,
    evaluation_sequences,
    ledger_key,
    tokens_sha256,
)
from bonsai_fast.evaluation.text_sources import builtin_text

TOKENIZER = byte_tokenizer()


def calibrate(source: str, **changes: object):  # type: ignore[no-untyped-def]
    return calibration_sequences(
        source, TOKENIZER, **{"num_sequences": 4, "length": 10, "seed": 0, **changes}
    )


def text_of(sequences: torch.Tensor) -> list[str]:
    return [TOKENIZER.decode(row) for row in sequences]


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{number:04d}," for number in range(200)))  # 1000 bytes
    return str(path)


def test_windows_do_not_overlap_and_stay_in_the_first_three_quarters(book: str) -> None:
    found = calibrate(book, num_sequences=75)
    assert "".join(text_of(found.input_ids)) == Path(book).read_text()[:750]


def test_seed_chooses_the_windows(book: str) -> None:
    assert torch.equal(calibrate(book).input_ids, calibrate(book).input_ids)
    assert not torch.equal(calibrate(book).input_ids, calibrate(book, seed=1).input_ids)
    assert calibrate(book).sha256 == calibrate(book).sha256 != calibrate(book, seed=1).sha256


def test_evaluation_of_the_same_text_reads_what_calibration_does_not(book: str) -> None:
    found = evaluation_sequences(book, TOKENIZER, max_tokens=1000, length=10, calibration=book)
    assert "".join(text_of(found.input_ids)) == Path(book).read_text()[750:]
    assert "750" in found.description


def test_evaluation_of_another_text_starts_at_its_beginning(book: str) -> None:
    found = evaluation_sequences(book, TOKENIZER, max_tokens=25, length=10, calibration="builtin")
    assert "".join(text_of(found.input_ids)) == Path(book).read_text()[:20]


def test_jsonl_takes_records_and_strings(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "a" * 40}) + "\n\n" + json.dumps("b" * 40) + "\n")
    found = calibrate(str(path), num_sequences=6)
    assert "".join(text_of(found.input_ids)) == ("a" * 40 + "\n\n" + "b" * 40)[:60]


def test_builtin_needs_no_network() -> None:
    assert len(builtin_text()) > 300_000
    assert calibrate("builtin").input_ids.shape == (4, 10)


def test_self_samples_from_the_model_by_seed() -> None:
    model = tiny_llama()
    first = calibrate("self", model=model)
    assert first.input_ids.shape == (4, 10) and first.input_ids.dtype == torch.int64
    assert torch.equal(first.input_ids, calibrate("self", model=model).input_ids)
    assert not torch.equal(first.input_ids, calibrate("self", model=model, seed=1).input_ids)


def fake_datasets(rows: list[dict[str, str]], calls: list[tuple[object, ...]]) -> ModuleType:
    def load_dataset(name: str, configuration: str | None, *, split: str, streaming: bool):  # type: ignore[no-untyped-def]
        calls.append((name, configuration, split, streaming))
        return iter(rows)

    return SimpleNamespace(load_dataset=load_dataset)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("source", "calibration", "evaluation"),
    [
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"), "test"),
        ("c4", ("allenai/c4", "en", "train"), "validation"),
        ("hf:some/name:part", ("some/name", "part", "train"), "train"),
        ("hf:some/name", ("some/name", None, "train"), "train"),
    ],
)
def test_hub_datasets_are_streamed(
    source: str, calibration: tuple[object, ...], evaluation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []
    rows = [{"text": "abcdefghij" * 10}] * 50
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows, calls))
    assert calibrate(source).input_ids.shape == (4, 10)
    evaluation_sequences(source, TOKENIZER, max_tokens=40, length=10, calibration=source)
    assert calls[0] == (*calibration, True) and calls[1][2] == evaluation


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        calibrate("wikitext2")


def test_bad_text_is_refused_in_one_line(book: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{oops\n')
    (tmp_path / "worse.jsonl").write_text('{"txt": "x"}\n')
    cases = {
        str(tmp_path / "empty.txt"): "is empty",
        str(tmp_path / "latin.txt"): "expected UTF-8, found byte 0xe9",
        str(tmp_path / "bad.jsonl"): "line 2: not JSON",
        str(tmp_path / "worse.jsonl"): "line 1: expected",
        str(tmp_path / "none.txt"): "no such file",
        "wikipedia": "expected wikitext2, c4, hf:",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            calibrate(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"too short: expected at least 76 x 10 tokens .* got 750"):
        calibrate(book, num_sequences=76)
    with pytest.raises(ValueError, match="too short: expected at least 300 tokens in its last 25%"):
        evaluation_sequences(book, TOKENIZER, max_tokens=999, length=300, calibration=book)
    with pytest.raises(ValueError, match="expected another source than self"):
        evaluation_sequences("self", TOKENIZER, max_tokens=99, length=10, calibration="builtin")


def test_the_two_recorded_forms_of_a_text() -> None:
    """Runs of earlier versions are found by them: neither may change."""
    tokens = torch.arange(12).view(3, 4)
    sha256 = "700a4498438a801b5781533040bce85a20ae4bfe08866f7552ff33e172923b0a"
    assert tokens_sha256(tokens) == tokens_sha256(tokens.view(4, 3)) == sha256
    assert ledger_key(tokens) == "4d342c941a8823b03e499d028923f2d6"
    assert len({ledger_key(x) for x in (tokens, tokens.view(4, 3), tokens + 1)}) == 3
