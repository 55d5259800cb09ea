"""Runs whose pruned model is recovered before it is saved; the tiers are fakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_tier import Scale, install, scaled
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from transformers import AutoModelForCausalLM

import bonsai_fast as bf
from bonsai_fast.checkpoints.streaming import open_streamed
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model
from bonsai_fast.prune.job import job_of
from bonsai_fast.recovery import TextWanted
from bonsai_fast.report.reproduce import recorded_config
from bonsai_fast.surgery import SavedModelError

QUIET = Reporter(quiet=True)
SMALL = {
    "method": "wanda-sp",
    "num_sequences": 4,
    "sequence_length": 32,
    "evaluation_tokens": 256,
    "calibration": "text.txt",
}


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A short text; no fresh process and no timing, which take longer than these runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))
    monkeypatch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)
    monkeypatch.setattr(pruned_model.SmallerModel, "measures_speed", False)


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> tuple[Scale, Scale]:
    """Two tiers: one reads the calibration text, the other trains."""
    found = (Scale("compensate"), Scale("distill", 0.25, TextWanted(256, 64)))
    install(monkeypatch, *found)
    return found


def prune(output: Path, model: object = None, **options: object) -> bf.PruneResult:
    config = bf.configure(**{**SMALL, **options})
    parent = tiny_llama() if model is None else model
    return bf.prune(parent, byte_tokenizer(), config, output_dir=output, reporter=QUIET)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output / "model").state_dict()


def is_scaled(output: Path, plain: Path, factor: float) -> bool:
    """Whether the down projections, and nothing else, are those of another run times a factor."""
    found, before = weights_of(output), weights_of(plain)
    names = scaled(tiny_llama())
    assert found.keys() == before.keys()
    return all(
        torch.equal(found[name], before[name] * (factor if name in names else 1)) for name in found
    )


def test_tiers_run_in_order_before_saving(tiers: tuple[Scale, Scale], tmp_path: Path) -> None:
    plain = prune(tmp_path / "plain", recover="none")
    result = prune(tmp_path / "run", recover="distill")
    assert plain.recovery is None and not tiers[0].tasks[1:]
    assert is_scaled(tmp_path / "run", tmp_path / "plain", 0.5)
    first, second = tiers[0].tasks[0], tiers[1].tasks[0]
    assert first.text.input_ids.shape == (4, 32) and second.text.input_ids.shape == (4, 64)
    assert first.held_out.input_ids.shape == (50, 32)
    assert first.student is second.student and first.teacher is not first.student
    assert first.options.recover == "distill" and first.folder != second.folder
    recovery = result.recovery
    assert recovery is not None and recovery["recover"] == "distill"
    assert [tier["name"] for tier in recovery["tiers"]] == ["compensate", "distill"]
    assert recovery["perplexity_before"] == plain.pruned_perplexity != result.pruned_perplexity
    assert "before recovery" in repr(result) and "before recovery" not in repr(plain)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["request"]["recover"] == "distill" and "recover" not in run["config"]
    assert run["result"]["recovery"] == recovery
    assert "recover_tokens" in run["request"]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"recovery", "cut"}


def test_a_finished_run_is_recovered_without_scoring(
    tiers: tuple[Scale, Scale], tmp_path: Path
) -> None:
    options = {"method": "bonsai", "recover": "none"}
    first = prune(tmp_path / "run", **options)
    assert first.submodels_scored > 0
    ledger = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "ledger").iterdir()}
    again = prune(tmp_path / "run", **{**options, "recover": "compensate"})
    assert again.submodels_scored == again.tokens_scored == 0
    assert ledger == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "ledger").iterdir()}
    assert again.recovery["perplexity_before"] == first.pruned_perplexity
    assert again.pruned_perplexity != first.pruned_perplexity
    # and back, and nothing if it is asked again
    assert prune(tmp_path / "run", **options).pruned_perplexity == first.pruned_perplexity
    assert len(tiers[0].tasks) == 1


def test_a_killed_start_goes_on_with_the_next_tier(
    tiers: tuple[Scale, Scale], tmp_path: Path
) -> None:
    prune(tmp_path / "plain", recover="none")
    tiers[1].dies = True
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "run", recover="distill")
    tiers[1].dies = False
    result = prune(tmp_path / "run", recover="distill")
    assert [len(tier.tasks) for tier in tiers] == [1, 2]
    assert tiers[1].tasks[0].folder == tiers[1].tasks[1].folder
    assert is_scaled(tmp_path / "run", tmp_path / "plain", 0.5)
    assert [tier["name"] for tier in result.recovery["tiers"]] == ["compensate", "distill"]


def test_an_interrupted_run_may_be_recovered_otherwise(
    tiers: tuple[Scale, Scale], tmp_path: Path
) -> None:
    prune(tmp_path / "plain", recover="none")
    tiers[1].dies = True
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "run", recover="distill")
    prune(tmp_path / "run", recover="compensate")
    assert is_scaled(tmp_path / "run", tmp_path / "plain", 2.0)


def test_streamed_as_in_memory(tiers: tuple[Scale, Scale], tmp_path: Path) -> None:
    parent = save_tiny_parent(tmp_path / "parent")
    loaded = AutoModelForCausalLM.from_pretrained(parent)
    first = prune(tmp_path / "loaded", loaded, recover="distill")
    streamed = open_streamed(parent, device="cpu")
    tiers[1].dies = True
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path / "streamed", streamed, recover="distill")
    cut = tmp_path / "streamed" / "cut" / "model.safetensors"
    written = cut.stat().st_mtime_ns
    tiers[1].dies = False
    second = prune(tmp_path / "streamed", streamed, recover="distill")
    assert written and [len(tier.tasks) for tier in tiers] == [2, 3]
    assert not cut.exists() and not (tmp_path / "streamed" / "recovery").exists()
    for name in ("model.safetensors", "config.json", "bonsai_report.json"):
        files = [tmp_path / run / "model" / name for run in ("loaded", "streamed")]
        if name != "bonsai_report.json":
            assert files[0].read_bytes() == files[1].read_bytes(), name
    assert second.pruned_perplexity == pytest.approx(first.pruned_perplexity, rel=1e-5)
    before = [each.recovery["perplexity_before"] for each in (first, second)]
    assert before[1] == pytest.approx(before[0], rel=1e-5)


def test_the_bias_of_flap_comes_first(tiers: tuple[Scale, Scale], tmp_path: Path) -> None:
    prune(tmp_path / "plain", method="flap", recover="none")
    prune(tmp_path / "run", method="flap", recover="compensate")
    assert is_scaled(tmp_path / "run", tmp_path / "plain", 2.0)
    biases = {name: x for name, x in weights_of(tmp_path / "run").items() if name.endswith("bias")}
    assert biases and any(bool(bias.any()) for bias in biases.values())


def test_zeroed_weights_stay_zero(tiers: tuple[Scale, Scale], tmp_path: Path) -> None:
    options = {"method": "magnitude", "pattern": "2:4"}
    plain = prune(tmp_path / "run", **options)
    assert plain.recovery is None
    before = weights_of(tmp_path / "run")
    again = prune(tmp_path / "run", recover="distill", **options)
    assert again.zeros == plain.zeros and not tiers[0].tasks
    after = weights_of(tmp_path / "run")
    names = scaled(tiny_llama())
    for name in after:
        assert torch.equal(after[name], before[name] * (0.25 if name in names else 1))
    # the pruned weights are still known
    back = prune(tmp_path / "run", recover="none", **options)
    assert back.pruned_perplexity == plain.pruned_perplexity
    with pytest.raises(ValueError, match="compensate does not keep zeroed weights at zero"):
        prune(tmp_path / "other", recover="compensate", **options)
    assert not (tmp_path / "other").exists()


def test_lost_zeros_are_found(
    tiers: tuple[Scale, Scale], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(task: object) -> object:
        record = Scale.run(tiers[1], task)
        with torch.no_grad():
            task.student.get_parameter(scaled(task.student)[0]).add_(1.0)
        return record

    monkeypatch.setattr(tiers[1], "run", run)
    with pytest.raises(SavedModelError, match="of the zeroed weights other than zero, in model"):
        prune(tmp_path / "run", recover="distill", method="wanda", pattern="2:4")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recover": "reconstruct"}, "recover: this version has no reconstruct"),
        ({"recover": "none", "recover_tokens": 9}, "recover_tokens: has no effect with recover="),
        ({"recover": "compensate", "recover_text": "a.txt"}, "recover_text: has no effect"),
        ({"recover": "distill", "recover_tokens": 0}, "recover_tokens: expected at least 1, got 0"),
        ({"recover": "distill", "recover_minutes": -1.0}, "recover_minutes: expected a positive"),
        ({"recover": "heal"}, "recover: expected one of none, compensate"),
        ({"recover": "distill", "recover_text": "a.txt"}, "calibration text: no such file: a.txt"),
        ({"recover": "distill", "calibration": "self"}, "recover_text: expected a text to train"),
    ],
)
def test_refused_before_work(
    options: dict[str, object], message: str, tiers: tuple[Scale, Scale], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prune(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_tier_refuses_before_work(tiers: tuple[Scale, Scale], tmp_path: Path) -> None:
    tiers[1].disk_bytes = 10**18
    with pytest.raises(ValueError, match=r"distill needs 1000000000.0 GB on the disk of .*run"):
        prune(tmp_path / "run", recover="distill")
    tiers[1].refuses = "pip install peft"
    with pytest.raises(ValueError, match="pip install peft"):
        prune(tmp_path / "run", recover="distill")
    config = bf.configure(**SMALL, recover="distill")
    with pytest.raises(ValueError, match="pip install peft"):
        job_of(tiny_llama(), byte_tokenizer(), config).plan(Path("run"), QUIET)
    assert not (tmp_path / "run").exists() and not tiers[0].tasks
    (tmp_path / "text.txt").write_text("a text of some words " * 400)
    (tmp_path / "other.txt").write_text("another text of words " * 400)
    sources = {"evaluation": str(tmp_path / "text.txt"), "recover_text": str(tmp_path / "text.txt")}
    with pytest.raises(ValueError, match="is the text for evaluation; train on another one"):
        prune(tmp_path / "run", recover="distill", **sources)


def test_the_plan_says_what_tiers_read(tiers: tuple[Scale, Scale]) -> None:
    tiers[1].disk_bytes = 5000
    config = bf.configure(**SMALL, recover="distill", recover_tokens=640)
    found = job_of(tiny_llama(), byte_tokenizer(), config).plan(Path("run"), QUIET)
    assert found["recovery"] == {
        "compensate": {"tokens": 128, "disk_bytes": 0},
        "distill": {"tokens": 640, "disk_bytes": 5000},
    }


def test_the_default_is_left_out_where_it_cannot_be(
    tiers: tuple[Scale, Scale], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was pruned before there was recovery is still pruned; a wish is refused."""
    tiers[0].refuses = "no such layer"
    result = prune(tmp_path / "run")
    assert result.recovery is None
    assert "the pruned model will not be recovered: no such layer" in result.warnings
    with pytest.raises(ValueError, match="no such layer"):
        prune(tmp_path / "asked", recover="compensate")
    tiers[0].refuses = ""
    assert prune(tmp_path / "run-2").recovery["recover"] == "compensate"
    # or after the search, when it sees what was cut
    tiers[0].refuses_cut = "no such cut"
    result = prune(tmp_path / "run-3")
    assert result.recovery is None
    assert "the pruned model is not recovered: no such cut" in result.warnings
    with pytest.raises(ValueError, match="no such cut"):
        prune(tmp_path / "asked", recover="compensate")


def test_runs_of_earlier_versions_are_what_they_were(
    tiers: tuple[Scale, Scale], tmp_path: Path
) -> None:
    """Their records do not name recovery: there was none."""
    result = prune(tmp_path / "run", recover="none")
    path = tmp_path / "run" / "run.json"
    manifest = json.loads(path.read_text())
    del manifest["request"]["recover"], manifest["result"]["recovery"]
    path.write_text(json.dumps(manifest))
    assert recorded_config(manifest).recover == "none"
    before = path.stat().st_mtime_ns
    assert prune(tmp_path / "run", recover="none") == result
    assert path.stat().st_mtime_ns == before
    again = prune(tmp_path / "run", recover="compensate")
    assert again.submodels_scored == 0 and again.recovery["recover"] == "compensate"
