"""The page of a run: whole, harmless, and it says what the records say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from full_disk import small_files
from report_cases import CONFIGS, page_of, parent_of, prune, result_of, without_fresh_processes
from report_pages import integer, value
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bonsai_fast as bf
from bonsai_fast.evaluation.perplexity import perplexity
from bonsai_fast.evaluation.text import evaluation_sequences
from bonsai_fast.report import RunRecord, write_report
from bonsai_fast.runs.ledger import Ledger
from bonsai_fast.runs.mask_files import load_mask


@pytest.fixture
def runs(report_runs: dict[str, Path]) -> dict[str, Path]:
    return report_runs


@pytest.mark.parametrize("name", CONFIGS)
def test_the_page_is_whole_and_needs_nothing_else(name: str, runs: dict[str, Path]) -> None:
    page = page_of(runs[name])
    names = {tag for tag, _ in page.tags}
    assert {"html", "title", "h1", "main"} <= names
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "a", "base"} & names
    attributes = {attribute for _, found in page.tags for attribute in found}
    assert not {"src", "href", "srcset", "xlink:href", "action", "data", "poster"} & attributes
    assert not [attribute for attribute in attributes if attribute.startswith("on")]
    without_namespace = page.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", without_namespace)
    assert (
        "default-src 'none'"
        in dict(page.tags[[t for t, _ in page.tags].index("meta") + 3][1])["content"]
    )
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    # every picture is named, or stands beside its numbers
    for tag, found in page.tags:
        if tag == "svg":
            named = found.get("aria-labelledby", "").split()
            assert set(named) <= set(ids) and (named or found["aria-hidden"] == "true")
    # what is missing is said
    assert all(section in ids or "Left out" in page.words["left-out"] for section in ("search",))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("interrupted", "weights")])
def test_headline_and_text_say_what_run_json_says(name: str, runs: dict[str, Path]) -> None:
    page, result = page_of(runs[name]), result_of(runs[name])
    dense, pruned = result["dense_perplexity"], result["pruned_perplexity"]
    assert page.row("result", "perplexity")[1:] == [
        f"{dense:,.2f}", f"{pruned:,.2f}", f"\N{MULTIPLICATION SIGN}{pruned / dense:.2f}",
    ]  # fmt: skip
    cells = page.row("result", "parameters")
    assert [integer(cell) for cell in cells[1:3]] == [
        result["parameters_dense"], result["parameters"],
    ]  # fmt: skip
    assert f"{100 * result['sparsity_total']:.1f}" in cells[3]
    before, after = (integer(cell) for cell in page.row("result", "of the decoder")[1:3])
    assert (before - after) / before == pytest.approx(result["sparsity"])
    for phase in ("prefill", "decode"):
        speeds = [
            result["latency"][model][f"{phase}_tokens_per_s"] for model in ("dense", "pruned")
        ]
        gain = result["latency"]["pruned"][f"{phase}_speedup"]
        assert page.row("result", f"{phase}, tokens/s")[1:] == [
            *(f"{speed:,.1f}" for speed in speeds), f"\N{MULTIPLICATION SIGN}{gain:.2f}",
        ]  # fmt: skip
        assert [f"{speed:,.1f}" in page.words["latency"] for speed in speeds] == [True, True]
    manifest = json.loads((runs[name] / "run.json").read_text())
    for said in (result["protocol"]["sha256"], manifest["calibration_sha256"]):
        assert said in page.words["protocol"]
    assert f"{result['protocol']['tokens']:,} predicted" in page.words["protocol"]
    assert manifest["parent"]["fingerprint"] in page.words["reproduce"]
    for package, version in manifest["versions"].items():
        assert f"{package} {version}" in page.words["reproduce"]
    for warning in result["warnings"]:
        assert warning in page.words["result"]
    assert result["peak_bytes"] is None or "beside the weights" in page.words["result"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "weights"])
def test_layers_are_those_of_the_saved_model(name: str, runs: dict[str, Path]) -> None:
    run = runs[name]
    page = page_of(run)
    rows = [row for row in page.tables["layers"] if row[0].isdigit()]
    if name == "interrupted":
        keep = load_mask(run / "masks" / "round-01.safetensors").keep
        layout = bf.Layout.of(AutoModelForCausalLM.from_pretrained(parent_of(run)))
        kept = [
            {kind: keep[g.start : g.stop].nonzero().flatten().tolist()}
            for g in layout.groups
            for kind in ("heads" if g.kind == "head" else "channels",)
        ]
        kept = [{**kept[2 * layer], **kept[2 * layer + 1]} for layer in range(4)]
        assert "after round-01" in page.words["layers"]
    else:
        found = json.loads((run / "model" / "bonsai_report.json").read_text())["kept"]
        kept = [found[str(layer)] for layer in range(4)]
    for row, layer in zip(rows, kept, strict=True):
        heads = len(layer["heads"])
        readers = len({head // 3 for head in layer["heads"]})
        wanted = [f"{heads}/6", f"{readers}/2"] if heads else ["removed"]
        wanted += ["", f"{len(layer['channels'])}/128" if layer["channels"] else "removed"]
        assert row[2:] == wanted
    filled = [c for tag, found in page.tags if tag == "rect" and (c := found.get("class", ""))]
    assert filled.count("cell kept") == sum(len(layer["heads"]) for layer in kept)
    assert filled.count("cell kept") + filled.count("cell gone") == 4 * 6


def test_rounds_of_a_search(runs: dict[str, Path]) -> None:
    """Points are measured: a round's perplexity is its model's, cut out and run."""
    run = runs["paper"]
    page, result = page_of(run), result_of(run)
    assert [found["name"] for found in result["rounds"]] == ["round-01", "round-02"]
    assert page.count("mark", "trajectory") == 2 + len(result["rounds"])
    parent = AutoModelForCausalLM.from_pretrained(parent_of(run), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(parent_of(run))
    layout = bf.Layout.of(parent)
    text = evaluation_sequences(
        "builtin", tokenizer, max_tokens=256, length=128, calibration="builtin"
    )
    assert text.sha256 == result["protocol"]["sha256"]
    for found in result["rounds"]:
        mask = load_mask(run / "masks" / f"{found['name']}.safetensors")
        smaller = bf.remove_units(parent, layout, mask.keep)
        assert mask.removed == parent.num_parameters() - smaller.num_parameters()
        assert found["sparsity"] == mask.removed / layout.num_decoder_parameters
        assert found["perplexity"] == pytest.approx(perplexity(smaller, text).value, rel=1e-4)
        row = page.row("rounds", found["name"])
        assert row[1].startswith(f"{100 * found['sparsity']:.2f}")
        assert row[2] == f"{found['perplexity']:,.2f}"
    for name in ("one-shot", "interrupted"):
        assert "Perplexity over the rounds" in page_of(runs[name]).words["left-out"]


def test_regressions_and_relevance(runs: dict[str, Path]) -> None:
    run = runs["paper"]
    page, record = page_of(run), RunRecord.read(run)
    assert list(record.regressions) == ["round-01", "round-02", "round-03"]
    for name, fit in record.regressions.items():
        finite = int((fit.held_out.isfinite() & fit.utility.isfinite()).sum())
        assert page.count("mark", f"agreement-{name}") == finite == fit.num_rows
        row = page.row("search", name)
        assert [value(cell) for cell in row[1:3]] == pytest.approx(
            [fit.kendall_tau, fit.r2], abs=6e-4
        )
        stage = record.stages[name]
        utility = -stage.values.double().mean(dim=1).exp()
        assert torch.equal(utility, fit.utility)
    first = record.regressions["round-01"]
    known = first.relevance.isfinite() & first.standard_error.isfinite()
    layout = record.layout
    assert layout is not None
    for kind in ("head", "channel"):
        own = [g for g in layout.groups if g.kind == kind]
        count = sum(int(known[g.start : g.stop].sum()) for g in own)
        marks = page.count("mark", f"relevance-{kind}")
        assert marks == page.count("error", f"relevance-{kind}") == min(count, 120) > 0
    best = int(torch.where(known, first.relevance, -torch.inf).argmax())
    group = next(g for g in layout.groups if best < g.stop)
    row = page.row("relevance", f"layer {group.layer}, {group.kind} {best - group.start}")
    assert value(row[1]) == pytest.approx(float(first.relevance[best]), rel=6e-3)
    assert value(row[2]) == pytest.approx(float(first.standard_error[best]), rel=6e-2)


def test_probes_and_plans_of_the_default(runs: dict[str, Path]) -> None:
    run = runs["grouped"]
    page, record = page_of(run), RunRecord.read(run)
    layout = record.layout
    assert layout is not None and record.relevance is not None
    ledger = Ledger(run / "ledger", layout.num_units)
    for name in ("round-01", "round-02"):
        masks = [
            keep.numpy().tobytes()
            for entry in ledger.entries
            for keep in entry.keep
            if entry.stage in (f"{name}/edges", f"{name}/curves")
        ]
        assert page.count("mark", f"agreement-{name}") == len(set(masks)) > 4
        assert page.row("search", name)[1] == str(len(set(masks)))
    entries = [entry for entry in ledger.entries if entry.stage == "round-01/probes"]
    values = torch.cat([entry.losses for entry in entries]).double()
    kinds = {"kv_group": "KV groups", "channel": "MLP channels", "mlp": "MLP sub-layers"}
    for place, group in enumerate(layout.groups):
        if group.kind in kinds:
            added = values[place + 1] - values[0]
            row = page.row("relevance", f"layer {group.layer}, {kinds[group.kind]}")
            assert value(row[2]) == pytest.approx(float(added.mean()), rel=6e-3)
            error = float(added.std()) / len(added) ** 0.5
            assert value(row[3]) == pytest.approx(error, rel=6e-2)
    for kind in ("kv_group", "channel", "attention", "mlp"):
        assert page.count("mark", f"cost-{kind}") == page.count("error", f"cost-{kind}") == 4


def test_methods_without_a_search_leave_sections_out_with_a_word(runs: dict[str, Path]) -> None:
    page = page_of(runs["one-shot"])
    assert not {"search", "relevance", "rounds"} & set(page.words)
    for words in (
        "Predicted and measured: this search by method flap",
        "Relevance: it was not",
        "no intermediate round",
    ):
        assert words in page.words["left-out"]
    page = page_of(runs["descent"])
    assert page.count("mark", "descent") == page.count("error", "descent") == 6
    losses = RunRecord.read(runs["descent"]).stages["step-00003"].values.double().mean(dim=1)
    assert page.row("search", "3")[1:] == [
        f"{float(loss):.3f}" for loss in (losses.min(), losses.mean(), losses.max())
    ]


def test_weights_that_are_zero(runs: dict[str, Path]) -> None:
    page, result = page_of(runs["weights"]), result_of(runs["weights"])
    cells = page.row("result", "zero weights")
    assert [integer(cell) for cell in cells[1:3]] == [0, result["zeros"]] and result["zeros"] > 0
    assert cells[3].startswith(f"{100 * result['sparsity']:.1f}")
    assert page.row("result", "perplexity")[2] == f"{result['pruned_perplexity']:,.2f}"
    assert "every layer keeps its shape" in page.words["left-out"]
    assert not {"layers", "rounds", "search", "relevance", "latency"} & set(page.words)
    assert "--method wanda" in page.words["reproduce"] and "2:4" in page.words["reproduce"]


def test_an_interrupted_run_says_so_and_is_not_touched(runs: dict[str, Path]) -> None:
    run = runs["interrupted"]
    page = page_of(run)
    assert "not finished" in page.words["result"] and "result" not in page.tables
    evaluations = sum(len(stage.keep) for stage in RunRecord.read(run).stages.values())
    assert f"{evaluations} scored sub-models, 1 of the rounds" in page.words["result"]
    assert page.count("mark", "agreement-round-01") == 12
    assert not {"latency", "completions", "rounds"} & set(page.words)
    # a run may be writing its next entry
    unfinished = run / "ledger" / "000099.safetensors.tmp"
    unfinished.write_bytes(b"half")
    write_report(run)
    assert unfinished.read_bytes() == b"half"
    unfinished.unlink()


def test_a_retargeted_run_shows_its_new_result(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_fresh_processes(monkeypatch)
    run = tmp_path / "run"
    shutil.copytree(runs["grouped"], run)
    before = result_of(run)
    prune(parent_of(run), run, "grouped", sparsity=0.2)
    page, result = page_of(run), result_of(run)
    assert result["parameters"] > before["parameters"] and result["rounds"] == []
    assert integer(page.row("result", "parameters")[2]) == result["parameters"]
    assert "selected from recorded scores" in page.words["result"]
    assert "agreement-round-01" in {figure for _, figure in page.marks}
    assert "--target sparsity=0.2" in page.words["reproduce"]


def test_a_full_disk_leaves_the_old_page(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    with small_files(), pytest.raises(OSError):
        write_report(runs["paper"], tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def test_recorded_relevance_is_what_was_estimated(runs: dict[str, Path]) -> None:
    """The record holds the regression's own numbers, bit by bit."""
    path = runs["paper"] / "regressions" / "round-01.safetensors"
    record = RunRecord.read(runs["paper"]).regressions["round-01"]
    tensors = load_file(path)
    assert set(tensors) == {"utility", "held_out", "relevance", "standard_error"}
    assert torch.equal(tensors["relevance"], record.relevance)
    assert record.num_rows + record.num_dropped == len(record.utility) == 12
