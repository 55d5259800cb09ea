"""The command that writes a page: what it adds, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import run_command
from report_cases import EVIL, page_of, parent_of
from report_pages import Page
from tiny import save_tiny_parent
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_fast.evaluation.completions import complete
from bonsai_fast.report import __main__ as report
from bonsai_fast.report import write_report


@pytest.fixture
def runs(report_runs: dict[str, Path]) -> dict[str, Path]:
    return report_runs


def test_the_command_writes_the_same_page_as_the_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, run in runs.items():
        code = report.main([str(run), "--output", str(tmp_path / name), "--no-samples"])
        out = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert code == 0 and out["finished"] == (name != "interrupted")
        assert (tmp_path / name).read_text() == (run / "report.html").read_text()


def test_untrusted_words_are_only_words(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["one-shot"], run)
    prompt = "</p><script>alert(1)</script> & so on"
    assert report.main([str(run), "--prompt", prompt, '"><b>']) == 0
    samples = json.loads((run / "samples.json").read_text())
    assert [sample["prompt"] for sample in samples] == [prompt, '"><b>']
    samples[0]["pruned"] = "<img src=x onerror=alert(2)>"
    (run / "samples.json").write_text(json.dumps(samples))
    write_report(run)
    page = page_of(run)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert prompt in page.words["completions"] and samples[0]["pruned"] in page.words["completions"]
    assert EVIL in page.words[""] and EVIL in page.words["reproduce"]


def test_completions_are_greedy_generation(runs: dict[str, Path]) -> None:
    parent = parent_of(runs["one-shot"])
    dense = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    pruned = AutoModelForCausalLM.from_pretrained(runs["one-shot"] / "model")
    tokenizer = AutoTokenizer.from_pretrained(parent)
    prompts = ("One", "x" * 120)  # the second one reaches the end of the context
    for found in complete(dense, pruned, tokenizer, prompts, num_tokens=12):
        for model, written in ((dense, found.dense), (pruned, found.pruned)):
            input_ids = tokenizer(found.prompt, return_tensors="pt").input_ids
            room = min(12, 128 - input_ids.shape[1])
            tokens = model.generate(input_ids, max_new_tokens=room, do_sample=False)
            new = tokens[0, input_ids.shape[1] :]
            assert written == tokenizer.decode(new, skip_special_tokens=True)
    with pytest.raises(ValueError, match="prompt: expected some text, got ''"):
        complete(dense, pruned, tokenizer, ("",))


LATENCY = {
    "device": "cpu", "threads": 2, "rounds": 5,
    "results": [
        {
            "model": "<i>a", "batch": 8, "prefill_tokens_per_s": 1234.56, "prefill_speedup": 1.0,
            "prefill_spread": 0.04,
            "decode_tokens_per_s": 9.87, "decode_speedup": 1.5, "time_to_first_token_s": 0.0123,
            "peak_bytes": 3 * 2**30, "prefill_tokens": 512, "decode_tokens": 32,
        },
        {"model": "b", "batch": 1, "prefill_tokens_per_s": 2.0, "decode_tokens_per_s": 1.0},
    ],
}  # fmt: skip


def test_latency_of_the_other_command(runs: dict[str, Path], tmp_path: Path) -> None:
    file, output = tmp_path / "latency.txt", tmp_path / "page.html"
    for text in (f"a table\nof its\n{json.dumps(LATENCY)}\n", json.dumps(LATENCY, indent=1)):
        file.write_text(text)
        arguments = [str(runs["one-shot"]), "--no-samples", "--latency", str(file)]
        assert report.main([*arguments, "--output", str(output)]) == 0
        page = Page(output.read_text())
        assert page.row("latency", "<i>a")[1:] == [
            *("8", "1,234.6", "4\N{NO-BREAK SPACE}%", "\N{MULTIPLICATION SIGN}1.00", "12.3"),
            *("9.9", "", "\N{MULTIPLICATION SIGN}1.50", "3\N{NO-BREAK SPACE}GiB"),
        ]
        assert page.row("latency", "b")[1:] == ["1", "2.0", "", "", "", "1.0", "", "", ""]
        assert "device cpu, threads 2, rounds 5, prompt 512, new tokens 32" in page.words["latency"]


def broken(run: Path, where: Path, file: str, content: bytes) -> str:
    shutil.copytree(run, where)
    (where / file).write_bytes(content)
    return str(where)


BAD = {
    "no directory": (lambda r, t: ["nowhere"], "expected a run directory of bonsai_fast"),
    "no run": (lambda r, t: [str(t)], "expected a run directory of bonsai_fast"),
    "no arguments": (lambda r, t: [], "RUN is missing"),
    "unknown flag": (lambda r, t: [str(r["paper"]), "--promt", "x"], "Did you mean --prompt?"),
    "no samples of a prompt": (
        lambda r, t: [str(r["paper"]), "--prompt", "x", "--no-samples"],
        "not both",
    ),
    "prompt without a model": (
        lambda r, t: [str(r["interrupted"]), "--prompt", "x"],
        "not finished",
    ),
    "empty prompt": (lambda r, t: [str(r["one-shot"]), "--prompt", ""], "expected some text"),
    "run.json of another": (
        lambda r, t: [broken(r["paper"], t / "r", "run.json", b"[1]")],
        "expected the record of a run",
    ),
    "damaged ledger": (
        lambda r, t: [broken(r["paper"], t / "r", "ledger/000000.safetensors", b"x")],
        "000000.safetensors cannot be read",
    ),
    "damaged mask": (
        lambda r, t: [broken(r["paper"], t / "r", "masks/final.safetensors", b"x")],
        "expected a mask",
    ),
    "damaged regression": (
        lambda r, t: [broken(r["paper"], t / "r", "regressions/round-02.safetensors", b"x")],
        "expected a regression",
    ),
    "damaged layout": (
        lambda r, t: [broken(r["paper"], t / "r", "layout.json", b"{}")],
        "a record is damaged",
    ),
    "damaged samples": (
        lambda r, t: [broken(r["paper"], t / "r", "samples.json", b'[{"a": 1}]')],
        "expected completions",
    ),
    "no latency file": (lambda r, t: [str(r["paper"]), "--latency", "none"], "none"),
    "latency of something else": (
        lambda r, t: [str(r["paper"]), "--latency", str(r["paper"] / "run.json")],
        "no list of results",
    ),
    "nowhere to write": (
        lambda r, t: [str(r["paper"]), "--output", str(t / "a" / "b.html")],
        "No such file or directory",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(
    name: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[name]
    pages = {run: (run / "report.html").read_bytes() for run in runs.values()}
    code, out, err = run_command(report.main, capsys, *make(runs, tmp_path))  # type: ignore[no-untyped-call]
    assert code == 2 and out == "" and err.startswith("error: "), err
    assert err.count("\n") == 1 and message in err, err
    assert pages == {run: (run / "report.html").read_bytes() for run in runs.values()}


def test_another_parent_is_not_taken_for_the_one_that_was_pruned(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["one-shot"], run)
    manifest = json.loads((run / "run.json").read_text())
    manifest["parent"]["name"] = str(save_tiny_parent(tmp_path / "other", hidden_size=24))
    (run / "run.json").write_text(json.dumps(manifest))
    assert report.main([str(run), "--prompt", "x"]) == 2
    assert "is not the one that was pruned" in capsys.readouterr().err
    (run / "samples.json").unlink()
    assert report.main([str(run)]) == 0
    assert "no completions: model" in capsys.readouterr().err
    assert "Completions: no completions were recorded" in page_of(run).words["left-out"]
