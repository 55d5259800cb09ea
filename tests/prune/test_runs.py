"""Whole runs: they survive kill -9, resume to the same bytes, and are re-targeted for nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import start
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from transformers import AutoModelForCausalLM

import bonsai_fast as bf
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model
from bonsai_fast.methods import Search
from bonsai_fast.methods.allocation import Target
from bonsai_fast.prune.units import prepare
from bonsai_fast.runs.directory import open_run
from bonsai_fast.runs.ledger import Ledger

QUIET = Reporter(quiet=True)
SMALL = {"num_sequences": 2, "sequence_length": 32, "evaluation_tokens": 512, "recover": "none"}
PRESETS = {
    "default": {"preset": "default", **SMALL},
    "paper": {"preset": "paper", "rounds": 2, "submodels_per_round": 12, **SMALL},
}


def prune(output: Path, **options: object) -> bf.PruneResult:
    config = bf.configure(**options)
    return bf.prune(tiny_llama(), byte_tokenizer(), config, output_dir=output, reporter=QUIET)


def masks_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "masks").iterdir())}


@pytest.fixture
def not_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose results other tests load in a fresh process, which takes longer than they."""
    monkeypatch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_meets_its_target_and_says_what_it_did(preset: str, tmp_path: Path) -> None:
    result = prune(tmp_path / "run", sparsity=0.3, **PRESETS[preset])
    layout = bf.Layout.of(tiny_llama(), attention="kv-group" if preset == "default" else "head")
    removed = layout.num_removed_parameters(result.keep_mask)
    # 0.5 % of so small a model is less than its smallest step
    assert 0.92 * 0.3 <= result.sparsity <= 0.3
    assert result.sparsity == removed / layout.num_decoder_parameters
    assert result.parameters == result.parameters_dense - removed
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert model.num_parameters() == result.parameters
    assert result.pruned_perplexity > 0 and result.protocol["dataset"] == "builtin"
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["status"] == "finished" and manifest["versions"]["torch"] == torch.__version__
    report = json.loads((Path(result.output) / "bonsai_report.json").read_text())
    kept = sum(len(layer.get("channels", [])) for layer in report["kept"].values())
    channels = [g for g in layout.groups if g.kind == "channel"]
    assert kept == sum(int(result.keep_mask[g.start : g.stop].sum()) for g in channels)


@pytest.mark.parametrize("preset", PRESETS)
def test_same_seed_same_masks_other_seed_other_masks(preset: str, tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("a", "b", "c")}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = bf.configure(sparsity=0.2, seed=seed, **PRESETS[preset])
        task = prepare(tiny_llama(), byte_tokenizer(), config)
        run = open_run(runs[name], task.config, task.layout, task.model, task.calibration.sha256)
        run.save_mask("final", task.method.find(Search(task, run, QUIET)))
    assert masks_of(runs["a"]) == masks_of(runs["b"]) != masks_of(runs["c"])


@pytest.mark.usefixtures("not_loaded_again")
@pytest.mark.parametrize("preset", PRESETS)
def test_finished_run_is_retargeted_without_scoring(preset: str, tmp_path: Path) -> None:
    options = PRESETS[preset]
    first = prune(tmp_path / "run", sparsity=0.4, **options)
    assert first.submodels_scored > 0
    for sparsity in (0.25,) if preset == "paper" else (0.25, 0.5):
        again = prune(tmp_path / "run", sparsity=sparsity, **options)
        assert again.submodels_scored == again.tokens_scored == 0
        assert 0.9 * sparsity <= again.sparsity <= sparsity
    params = Target(params=first.parameters + 1000)
    result = prune(tmp_path / "run", target=str(params), **options)
    assert params.params is not None and result.submodels_scored == 0
    assert params.params <= result.parameters <= 1.05 * params.params


@pytest.mark.usefixtures("not_loaded_again")
def test_repeating_a_finished_run_does_nothing(tmp_path: Path) -> None:
    first = prune(tmp_path / "run", sparsity=0.2, **PRESETS["default"])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert prune(tmp_path / "run", sparsity=0.2, **PRESETS["default"]) == first
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.usefixtures("not_loaded_again")
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "head"},
        {"regression": "ridge", "submodels_per_round": 16},
        {"sublayers": True},
        {"uniform": True},
        {"head_layout": "free", "round_to": "1"},
        {"prior": "uniform"},
        {"calibration": "self"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_run(options: dict[str, object], tmp_path: Path) -> None:
    result = prune(tmp_path / "run", sparsity=0.3, **{**PRESETS["default"], **options})
    # a layer's widths are coarse in so small a model, and uniform ones are coarser
    assert (0.15 if "uniform" in options else 0.9 * 0.3) <= result.sparsity <= 0.3
    config = json.loads((Path(result.output) / "config.json").read_text())
    assert config["model_type"] == ("llama" if "uniform" in options else "bonsai_llama")


@pytest.mark.usefixtures("not_loaded_again")
def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    prune(tmp_path / "run", sparsity=0.2, **PRESETS["default"])
    before = masks_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds another run \(.*seed: 0 there, 7 here\)"):
        prune(tmp_path / "run", sparsity=0.2, seed=7, **PRESETS["default"])
    assert masks_of(tmp_path / "run") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="found something else there"):
        prune(tmp_path / "mine", **PRESETS["default"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def command(parent: Path, run: Path) -> list[str]:
    flags = "--preset paper --rounds 3 --sparsity 0.25 --submodels-per-round 50"
    # few sub-models a batch, so that there is something to interrupt
    flags += " --num-sequences 4 --sequence-length 64 --memory-budget 600KB --evaluation-tokens 256"
    return ["bonsai_fast.prune", str(parent), *flags.split(), "--output", str(run)]


@pytest.mark.slow
def test_five_kills_and_a_resume_give_the_same_bytes(tmp_path: Path) -> None:
    parent = save_tiny_parent(tmp_path / "parent")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(
        [sys.executable, "-P", "-m", *command(parent, whole)], check=True, capture_output=True
    )
    entries = len(list((whole / "ledger").iterdir()))
    assert entries > 20
    draw = random.Random(0)
    for kill in range(5):
        process = start(*command(parent, broken), folder=tmp_path)
        # somewhere in this start's share of the work; the last one may hit the saving
        wanted = min(entries, int((kill + draw.random()) * entries / 4))
        while process.runs and _num_entries(broken) < wanted:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        process.kill()
    code, out, err = start(*command(parent, broken), folder=tmp_path).wait()
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["output"] == str(broken / "model")
    assert masks_of(broken) == masks_of(whole)
    for one, other in zip(
        *(Ledger(run / "ledger", 536).entries for run in (whole, broken)), strict=True
    ):
        assert one.stage == other.stage and torch.equal(one.keep, other.keep)
        assert torch.equal(one.losses, other.losses)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
    assert not [path for path in broken.rglob("*") if path.name.endswith((".tmp", ".new", ".old"))]


def _num_entries(run: Path) -> int:
    return len(list((run / "ledger").glob("*.safetensors")))
