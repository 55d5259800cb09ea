"""What recovery brings to each cell of a comparison, on several texts.

    python bench/recovery_table.py COMPARISON... --evaluation TEXT,TEXT --calibration TEXT

COMPARISON is the directory of `bonsai-fast compare`. The mask of each of its cells is cut out of
the parent again; the model is measured as pruned, after compensation, and after distillation that
starts there. All cells recover on the same text and train on equally many tokens, and what is
measured chose nothing. Nothing is searched, so the comparison needs no recovery of its own.

Each cell is recorded in OUTPUT when it is finished, and the same command resumes. The last line of
stdout is JSON: for each cell, perplexity by step and text, with the dense model under "dense".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.load import LoadingOptions, load_parent
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.perplexity import perplexity
from bonsai_fast.evaluation.text import (
    EVALUATION_LENGTH,
    Sequences,
    calibration_sequences,
    evaluation_sequences,
    longest_window,
)
from bonsai_fast.files import write_json
from bonsai_fast.methods import METHODS, Search, Task
from bonsai_fast.methods.allocation import Target
from bonsai_fast.methods.configure import config_of_record
from bonsai_fast.models.layout import Layout
from bonsai_fast.prune.request_checks import calibration_text
from bonsai_fast.prune.units import pruned_model
from bonsai_fast.recovery.recover_model import prepare_recovery
from bonsai_fast.runs.directory import UnitRun
from bonsai_fast.runs.ledger import Ledger
from bonsai_fast.runs.mask_files import load_mask
from bonsai_fast.scoring import MaskScorer

Texts = dict[str, Sequences]


def measured(model: PreTrainedModel, texts: Texts) -> dict[str, float | None]:
    """Perplexity on each text; None where it overflows."""
    values = {name: perplexity(model, text).value for name, text in texts.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def cut(cell: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The smaller model of a finished cell, with what its method compensates for.

    Raises:
        ValueError: the cell's request cannot be met by this model.
    """
    state = json.loads((cell / "run.json").read_text())
    config = config_of_record({**state["config"], "target": state["request"]["target"]})
    layout = Layout.of(
        model,
        attention=config.options.attention,
        experts=config.options.experts,
        sublayers=config.options.sublayers,
    )
    length = config.sequence_length or longest_window(model)
    calibration = calibration_text(config, tokenizer, model, length)
    budget = Target.parse(config.target_text).removal_budget(layout)
    scorer, method = MaskScorer(model, layout=layout), METHODS[config.method]
    task = Task(model, tokenizer, scorer, calibration, calibration, config, method, budget)
    run = UnitRun(cell, {}, {}, "retarget", Ledger(cell / "ledger", len(layout)), layout)
    keep = load_mask(cell / "masks" / "final.safetensors").keep
    return pruned_model(Search(task, run, Reporter(quiet=True)), keep)


def recovered(
    smaller: PreTrainedModel,
    options: RecoverOptions,
    *,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Sequences,
    texts: Texts,
) -> dict[str, Any]:
    """Measure a pruned model before and after each tier; the model is changed."""
    recovery = prepare_recovery(
        options,
        teacher=teacher,
        tokenizer=tokenizer,
        calibration=calibration,
        evaluation=next(iter(texts.values())),
        seed=0,
        memory_budget=None,
    )
    assert recovery is not None
    found: dict[str, Any] = {"pruned": measured(smaller, texts)}
    for name, tier in recovery.tiers.items():
        step = replace(recovery, tiers={name: tier}, texts={name: recovery.texts[name]})
        with TemporaryDirectory() as folder:
            (record,) = step.run(smaller, Path(folder), Reporter()).records
        found[name] = {**measured(smaller, texts), "tokens": record.tokens}
    return found


def table(cells: dict[str, Any], texts: list[str]) -> str:
    """The cells as a Markdown table; in each column, the texts one after another."""
    steps = ("pruned", "compensate", "distill")
    lines = ["| cell | " + " | ".join(steps) + " |", "| --- " * (1 + len(steps)) + "|"]
    for name, cell in cells.items():
        columns = [
            " / ".join("inf" if cell[s][t] is None else f"{cell[s][t]:,.1f}" for t in texts)
            for s in steps
        ]
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparisons", nargs="+", type=Path, metavar="COMPARISON")
    parser.add_argument("--model", help="the parent; default: the one in the package")
    parser.add_argument("--calibration", required=True, metavar="TEXT")
    parser.add_argument("--evaluation", required=True, metavar="TEXT,TEXT")
    parser.add_argument("--evaluation-tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--recover-tokens", type=int, default=20480, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(arguments)
    model, tokenizer = load_parent(given.model, LoadingOptions())
    texts = {
        source: evaluation_sequences(
            source, tokenizer, max_tokens=given.evaluation_tokens,
            length=min(EVALUATION_LENGTH, longest_window(model)),
            calibration=given.calibration,
        )
        for source in given.evaluation.split(",")
    }  # fmt: skip
    calibration = calibration_sequences(
        given.calibration, tokenizer, num_sequences=64, length=256, seed=0, model=model
    )
    options = RecoverOptions(recover="distill", recover_tokens=given.recover_tokens)
    given.output.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Any] = {}
    for comparison in given.comparisons:
        for file in sorted(comparison.glob("*/cell.json")):
            known = given.output / f"{comparison.name}-{file.parent.name}.json"
            if not known.is_file():
                print(f"{known.stem}", file=sys.stderr)
                smaller = cut(file.parent, model, tokenizer)
                done = recovered(
                    smaller, options, teacher=model, tokenizer=tokenizer,
                    calibration=calibration, texts=texts,
                )  # fmt: skip
                write_json(known, done)
            cells[known.stem] = json.loads(known.read_text())
    print(table(cells, list(texts)))
    print(json.dumps({"dense": measured(model, texts), "cells": cells}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
