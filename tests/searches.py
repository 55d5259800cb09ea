"""Starts of runs without the command around them: what tests of methods work with."""

from __future__ import annotations

from pathlib import Path

import torch
from surgery_cases import tokens
from tiny import byte_tokenizer
from transformers import PreTrainedModel

from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
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
    layout = Layout.of(model, attention=own.attention, sublayers=own.sublayers)
    text = Sequences(tokens(12) if input_ids is None else input_ids, "random", "random tokens")
    scorer = MaskScorer(model, layout=layout, route=own.route, memory_budget=config.memory_budget)
    budget = Target.parse(config.target_text).removal_budget(layout)
    method = METHODS[config.method]
    task = Task(model, byte_tokenizer(), scorer, text, text, config, method, budget, compensates)
    run = open_run(output, config, layout, model, text.sha256)
    return Search(task, run, Reporter(quiet=quiet))
