"""Every method, whole: target, seed, an interruption anywhere, another target from the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from searches import assert_same_record, found_in_spite_of_stops, new_search
from tiny import byte_tokenizer, tiny_llama

import bonsai_fast as bf
from bonsai_fast.console import Reporter
from bonsai_fast.methods import METHODS, NotRecordedError, Search
from bonsai_fast.methods.configure import all_options
from bonsai_fast.prune.units import pruned_model

TEXT = torch.randint(2, 258, (4, 32), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, dict[str, object]] = {
    "wanda-sp": {},
    "magnitude-l1": {},
    "magnitude-l2": {},
    "random": {},
    "layerwise-ppl": {},
    "flap": {},
    "taylor": {},
    "policy-gradient": {
        "rounds": 5,
        "submodels_per_round": 4,
        "batch_size": 2,
        # few steps shall matter
        "learning_rate": 0.1,
        "granularity": "units",
    },
    "mini-llm": {"directions": 2},
}
SEEDED = {"random", "policy-gradient", "mini-llm"}


def search_in(path: Path, method: str, sparsity: float = 0.3, **options: object) -> Search:
    return new_search(
        tiny_llama(),
        path,
        input_ids=TEXT,
        method=method,
        sparsity=sparsity,
        **{**OPTIONS[method], **options},
    )


def find(search: Search) -> torch.Tensor:
    return search.task.method.find(search)


def close(search: Search) -> None:
    """What the pipeline does once the model is saved."""
    (search.run.path / "model").mkdir(exist_ok=True)
    (search.run.path / "model" / "config.json").write_text("{}")
    search.run.record("finished")


def sparsity_of(search: Search, keep: torch.Tensor) -> float:
    layout = search.task.layout
    return layout.num_removed_parameters(keep) / layout.num_decoder_parameters


def test_every_method_is_tested() -> None:
    # reap is for mixtures of experts: tests/methods/units/test_reap.py
    assert OPTIONS.keys() | {"bonsai", "reap"} == METHODS.keys()


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_target_and_plan(method: str, preset: str, tmp_path: Path) -> None:
    # the published number of steps is for a GPU
    options = {"rounds": 5} if method == "policy-gradient" else {}
    search = search_in(tmp_path / "run", method, preset=preset, **options)
    plan = search.task.method.plan(search.task)
    keep = find(search)
    # with rounded widths, 0.5 % of so small a model is less than its smallest step
    least = 0.92 if preset == "default" else 0.995
    extra = 0.01 if method == "flap" else 0.0  # what its biases are worth
    assert least * 0.3 <= sparsity_of(search, keep) <= 0.3 + extra
    assert plan.submodels == search.submodels_scored
    assert plan.tokens == search.tokens_scored
    smaller = pruned_model(search, keep)
    layout = search.task.layout
    assert layout.num_model_parameters - search.task.budget <= smaller.num_parameters()
    assert bool(smaller(input_ids=TEXT).logits.isfinite().all())


@pytest.mark.parametrize("method", OPTIONS)
def test_seeds(method: str, tmp_path: Path) -> None:
    one, same, other = (
        find(search_in(tmp_path / name, method, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(one, same)
    assert torch.equal(one, other) == (method not in SEEDED)


@pytest.mark.parametrize("method", OPTIONS)
def test_interrupted_anywhere_gives_the_same_bits(method: str, tmp_path: Path) -> None:
    """The disk takes two more files at every start, until the run gets through."""
    whole = search_in(tmp_path / "whole", method)
    keep = find(whole)
    weights = pruned_model(whole, keep).state_dict()
    search, again, _ = found_in_spite_of_stops(
        lambda: search_in(tmp_path / "broken", method), files=2
    )
    assert torch.equal(again, keep)
    resumed = pruned_model(search, again).state_dict()
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert_same_record(whole, search)


@pytest.mark.parametrize("method", OPTIONS)
def test_another_target_costs_nothing(method: str, tmp_path: Path) -> None:
    first = search_in(tmp_path / "run", method, sparsity=0.4)
    find(first)
    close(first)
    for sparsity in (0.2, 0.5):
        again = search_in(tmp_path / "run", method, sparsity=sparsity)
        assert again.run.start == "retarget"
        keep = find(again)
        pruned_model(again, keep)
        assert again.submodels_scored == again.tokens_scored == 0
        assert 0.9 * sparsity <= sparsity_of(again, keep) <= sparsity + 0.01
        close(again)


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    """It recorded every option of every method, most of them as null."""
    for method in ("policy-gradient", "flap"):
        path = tmp_path / method
        search_in(path, method)
        manifest = json.loads((path / "run.json").read_text())
        defaults = {"route": "auto", "precision": "full", "spare_first": 0, "spare_last": 0}
        assert defaults.items() <= manifest["config"].items()
        nothing = dict.fromkeys((*all_options(), "no_longer_there"))
        manifest["config"] = {**nothing, **manifest["config"], **dict.fromkeys(defaults)}
        if method == "flap":
            manifest["config"] |= {"prior": "wanda", "regression": "groups"}
        (path / "run.json").write_text(json.dumps(manifest))
        assert search_in(path, method).run.start == "resume"
        with pytest.raises(ValueError, match="spare_first: 0 there, 1 here"):
            search_in(path, method, spare_first=1)


def test_what_is_not_on_record_is_not_made_up(tmp_path: Path) -> None:
    search = search_in(tmp_path / "run", "flap")
    close(search)
    with pytest.raises(NotRecordedError, match="needs a new run"):
        find(search_in(tmp_path / "run", "flap", sparsity=0.2))


def test_flap_from_end_to_end(tmp_path: Path) -> None:
    """Biases are counted, saved, and there again in a fresh process."""
    config = bf.PruneConfig(
        method="flap", sparsity=0.3, num_sequences=2, sequence_length=32, evaluation_tokens=256
    )
    parent = tiny_llama()
    result = bf.prune(
        parent,
        byte_tokenizer(),
        config,
        output_dir=tmp_path / "run",
        reporter=Reporter(quiet=True),
    )
    assert 0.92 * 0.3 <= result.sparsity <= 0.3
    layout = bf.Layout.of(parent, attention="kv-group")
    cut = layout.num_model_parameters - layout.num_removed_parameters(result.keep_mask)
    assert result.parameters == cut + 2 * 4 * 48
