"""Starts of runs without the command around them: what tests of methods work with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from surgery_cases import tokens
from tiny import byte_tokenizer
from transformers import PreTrainedModel

from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.files import write_atomically
from bonsai_fast.methods import METHODS, Search, Task, configure, resolve
from bonsai_fast.methods.allocation import Target
from bonsai_fast.models.layout import Layout
from bonsai_fast.runs.directory import open_run
from bonsai_fast.scoring import MaskScorer


def new_search(
    model: PreTrainedModel,
    output: Path,
    *,
    input_ids: torch.Tensor | None = None,
    quiet: bool = True,
    compensates: bool = False,
    **options: object,
) -> Search:
    """A start of a run in `output` on random tokens."""
    config = resolve(configure(**options))
    own = config.options
    layout = Layout.of(model, attention=own.attention, experts=own.experts, sublayers=own.sublayers)
    text = Sequences(tokens(12) if input_ids is None else input_ids, "random", "random tokens")
    scorer = MaskScorer(model, layout=layout, route=own.route, memory_budget=config.memory_budget)
    budget = Target.parse(config.target_text).removal_budget(layout)
    method = METHODS[config.method]
    task = Task(model, byte_tokenizer(), scorer, text, text, config, method, budget, compensates)
    run = open_run(output, config, layout, model, text.sha256)
    return Search(task, run, Reporter(quiet=quiet))


class Stop(Exception):
    """The power goes."""


def found_in_spite_of_stops(
    start: Callable[[], Search], *, files: int, also: tuple[str, ...] = ()
) -> tuple[Search, torch.Tensor, int]:
    """Starts of a run where the disk takes a few more files each time, until one gets through.

    Args:
        start: makes a start of the run.
        files: written by each start before it stops.
        also: modules that write files, besides those of the ledger and of sessions.
    Returns:
        the last start, the units to keep, and the number of starts.
    """
    for number in range(1, 60):
        search, written = start(), [0]

        def write(path: Path, content: bytes, written: list[int] = written) -> None:
            if written[0] >= files:
                raise Stop
            written[0] += 1
            write_atomically(path, content)

        with pytest.MonkeyPatch.context() as patch:
            for place in ("bonsai_fast.runs.ledger", "bonsai_fast.methods.session", *also):
                patch.setattr(f"{place}.write_atomically", write)
            with suppress(Stop):
                return search, search.task.method.find(search), number
    raise AssertionError("no start got through")


def assert_same_record(one: Search, other: Search) -> None:
    """The ledgers hold the same evaluations."""
    for a, b in zip(one.run.ledger.entries, other.run.ledger.entries, strict=True):
        assert torch.equal(a.keep, b.keep) and torch.equal(a.losses, b.losses)
