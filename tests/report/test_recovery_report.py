"""What the report and the model card say about recovery."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_tier import Scale, install
from report_pages import Page
from tiny import byte_tokenizer, tiny_llama

import bonsai_fast as bf
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model
from bonsai_fast.recovery import TextWanted
from bonsai_fast.report.figures import Measured, training


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was recovered by two tiers."""
    folder = tmp_path_factory.mktemp("recovered")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))
    config = {"num_sequences": 4, "sequence_length": 32, "evaluation_tokens": 256}
    with pytest.MonkeyPatch.context() as patch:
        install(patch, Scale("compensate"), Scale("distill", 0.25, TextWanted(128, 64)))
        patch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)
        asked = bf.configure(method="wanda-sp", calibration=str(text), recover="distill", **config)
        bf.prune(
            tiny_llama(), byte_tokenizer(), asked, output_dir=folder / "run",
            reporter=Reporter(quiet=True),
        )  # fmt: skip
    return folder / "run"


def test_the_page_shows_every_tier(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    result = json.loads((run / "run.json").read_text())["result"]
    before, after = result["recovery"]["perplexity_before"], result["pruned_perplexity"]
    words = " ".join(" ".join(page.words.values()).split())
    assert f"perplexity was {before:,.2f}" in words and f"and is {after:,.2f}" in words
    assert f"It was {before:,.2f} before recovery (distill)." in words
    for name in ("compensate", "distill"):
        assert f"Loss against tokens, {name}" in (run / "report.html").read_text()
        assert f"Training of {name}" in words
    for shown in ("2.5000", "2.2500", "\N{MINUS SIGN}0.2500", "every weight was scaled."):
        assert shown in words
    assert "--recover distill" in words
    assert "of 64 tokens" in words


def test_the_card_says_how_it_was_recovered(run: Path) -> None:
    card = (run / "model" / "README.md").read_text()
    before = json.loads((run / "run.json").read_text())["result"]["recovery"]["perplexity_before"]
    assert f"| perplexity before recovery |  | {before:.2f} |" in card
    assert "After pruning, `distill`, with the parent as the teacher." in card
    assert "| distill |" in card and "| 2.5000 | 2.2500 |" in card


def test_a_curve_with_gaps() -> None:
    points = [Measured(10, 3.0, 2.9), Measured(20, 2.5, None), Measured(30, float("nan"), 2.0)]
    figure = training(points, name="training-x", heading="x")
    assert figure is not None and figure.count("<circle") == 4
    assert "held out: 2 after 30 tokens" in figure
    assert training(points[:1], name="training-x", heading="x") is None
