"""Finished and interrupted runs of every kind, made once for all tests of reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from report_pages import Page
from tiny import save_tiny_parent
from transformers import AutoModelForCausalLM, AutoTokenizer

import bonsai_fast as bf
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model
from bonsai_fast.methods import Search
from bonsai_fast.report import write_report

# a name is whatever its author likes
EVIL = 'm<script>alert("x")<'
SMALL = {"num_sequences": 3, "sequence_length": 32, "evaluation_tokens": 256, "recover": "none"}
PAPER = {"preset": "paper", "rounds": 3, "submodels_per_round": 12, "sparsity": 0.3}
CONFIGS = {
    "grouped": {"sparsity": 0.4, "sublayers": True},
    "paper": PAPER,
    "one-shot": {"method": "flap", "sparsity": 0.3},
    "descent": {"method": "policy-gradient", "rounds": 6, "submodels_per_round": 4},
    "weights": {"method": "wanda", "pattern": "2:4"},
    "interrupted": PAPER,
}


def make_runs(folder: Path) -> None:
    """A run of every kind in a folder; the one that is interrupted stops in its second round."""
    parent = save_tiny_parent(folder / EVIL)
    with pytest.MonkeyPatch.context() as patch:
        without_fresh_processes(patch)
        for name in CONFIGS:
            if name != "interrupted":
                prune(parent, folder / name, name)
        real = Search.losses

        def interrupt(search: Search, stage: str, *arguments: object, **how: object):  # type: ignore[no-untyped-def]
            if stage == "round-02":
                raise KeyboardInterrupt
            return real(search, stage, *arguments, **how)  # type: ignore[arg-type]

        patch.setattr(Search, "losses", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(parent, folder / "interrupted", "interrupted")
        write_report(folder / "interrupted")


def without_fresh_processes(patch: pytest.MonkeyPatch) -> None:
    """Loading in a fresh process is tested elsewhere, and takes longer than all of a tiny run."""
    patch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)


def prune(parent: str | Path, output: Path, name: str, **changes: object) -> None:
    """A run by the name of its kind, or the same with changes."""
    config = bf.configure(**{**SMALL, **CONFIGS[name], **changes})
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    bf.prune(model, tokenizer, config, output_dir=output, reporter=Reporter(quiet=True))


def page_of(run: Path) -> Page:
    """Its report."""
    return Page((run / "report.html").read_text())


def result_of(run: Path) -> dict:  # type: ignore[type-arg]
    """What run.json says it came to."""
    return dict(json.loads((run / "run.json").read_text())["result"])


def parent_of(run: Path) -> str:
    """Where its parent lies."""
    return str(json.loads((run / "run.json").read_text())["parent"]["name"])
