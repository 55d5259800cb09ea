"""The command `recover`: runs, saved models, other people's models; refusals; kills. Fake tiers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import run_command
from fake_tier import Scale, install, scaled
from forked import start
from report_pages import Page
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import bonsai_fast as bf
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model
from bonsai_fast.prune.__main__ import main as prune_main
from bonsai_fast.recover.__main__ import main
from bonsai_fast.recovery import TextWanted
from bonsai_fast.report.__main__ import main as report_main

recover = partial(run_command, main)
FLAGS = ("--num-sequences", 4, "--sequence-length", 32, "--evaluation-tokens", 256)
FLAGS += ("--calibration", "text.txt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent, a text and a finished run that was not recovered."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))
    save_tiny_parent(folder / "parent")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)
        patch.setattr(pruned_model.SmallerModel, "measures_speed", False)
        words = ("parent", "--method", "wanda-sp", "--output", "run", "--seed", "3", *FLAGS)
        assert prune_main([str(word) for word in (*words, "--recover", "none")]) == 0
    return folder


@pytest.fixture
def tiers(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Scale, Scale]:
    """Fake tiers, in a copy of the folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)
    found = (Scale("compensate"), Scale("distill", 0.25, TextWanted(256, 64)))
    install(monkeypatch, *found)
    return found


def is_scaled(found: str, before: str, factor: float) -> bool:
    """Whether the down projections, and nothing else, are those of another model times a factor."""
    now, then = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (found, before))
    names = scaled(tiny_llama())
    assert now.keys() == then.keys()
    return all(torch.equal(now[n], then[n] * (factor if n in names else 1)) for n in now)


def uniform(folder: str, zeros: bool = False, layers: int = 4) -> LlamaForCausalLM:
    """A model that others pruned: narrower, or with zeros, or with fewer layers."""
    model = tiny_llama(num_hidden_layers=layers, intermediate_size=128 if zeros else 96)
    if zeros:
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter.data.view(-1, 2)[:, 0] = 0.0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def test_a_run_is_recovered_on_its_own_text(tiers: tuple[Scale, Scale], capsys) -> None:
    code, out, err = recover(capsys, "run", "--output", "better", "--method", "distill")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    run = json.loads(Path("run/run.json").read_text())
    assert result["recovery"]["perplexity_before"] == run["result"]["pruned_perplexity"]
    assert result["protocol"] == run["result"]["protocol"] and "before recovery" in err
    assert is_scaled("better/model", "run/model", 0.5)
    first = tiers[0].tasks[0]
    assert first.seed == 3 and first.text.input_ids.shape == (4, 32)
    record = json.loads(Path("better/recover.json").read_text())
    assert record["status"] == "finished" and record["parent"]["name"] == "parent"
    assert record["calibration_sha256"] == run["calibration_sha256"]
    assert record["config"]["method"] == "distill" and record["result"] == result
    report = json.loads(Path("better/model/bonsai_report.json").read_text())
    before = json.loads(Path("run/model/bonsai_report.json").read_text())
    assert report["kept"] == before["kept"] and report["recovery"]["recover"] == "distill"
    assert sorted(path.name for path in Path("better").iterdir()) == [
        "model", "recover.json", "report.html",
    ]  # fmt: skip
    words = " ".join(" ".join(Page(Path("better/report.html").read_text()).words.values()).split())
    assert "Recovery report run, recovered" in words and "every weight was scaled." in words
    # again: nothing
    code, again, err = recover(capsys, "run", "--output", "better", "--method", "distill")
    assert code == 0 and json.loads(again) == result and "nothing to do" in err, err
    # its page, and recovering it once more
    Path("better/report.html").unlink()
    assert (
        run_command(report_main, capsys, "better")[0] == 0 and Path("better/report.html").exists()
    )
    code, out, err = recover(capsys, "better", "--output", "best")
    assert code == 0 and is_scaled("best/model", "run/model", 1.0), err


def test_a_saved_model_names_its_parent(tiers: tuple[Scale, Scale], capsys) -> None:
    shutil.move("run/model", "alone")
    code, _, err = recover(capsys, "alone", *FLAGS)
    assert code == 0, err
    assert is_scaled("alone-compensate/model", "alone", 2.0)
    parent = json.loads(Path("alone-compensate/recover.json").read_text())["parent"]
    assert parent["name"] == "parent"


def test_models_that_others_pruned(tiers: tuple[Scale, Scale], capsys) -> None:
    uniform("narrow")
    code, _, err = recover(capsys, "narrow", *FLAGS)
    assert code == 2 and "does not say what it was pruned from: name its parent with" in err
    code, out, err = recover(capsys, "narrow", "--teacher", "parent", "--output", "new", *FLAGS)
    assert code == 0, err
    assert is_scaled("new/model", "narrow", 2.0)
    assert json.loads(Path("new/model/config.json").read_text())["model_type"] == "llama"
    assert json.loads(out.splitlines()[-1])["sparsity"] > 0.1


def test_zeros_of_others_stay(tiers: tuple[Scale, Scale], capsys) -> None:
    uniform("sparse", zeros=True)
    flags = ("--teacher", "parent", "--output", "new", *FLAGS)
    code, _, err = recover(capsys, "sparse", *flags)
    assert code == 2 and "compensate does not keep zeroed weights" in err
    code, out, err = recover(capsys, "sparse", "--method", "distill", *flags)
    assert code == 0 and "compensate is left out: 50% of the decoder's weights" in err, err
    assert is_scaled("new/model", "sparse", 0.25)
    assert json.loads(out.splitlines()[-1])["zeros"] == pytest.approx(0.5, abs=0.01)


def test_fewer_layers_than_the_parent(tiers: tuple[Scale, Scale], capsys) -> None:
    uniform("short", layers=3)
    flags = ("--teacher", "parent", "--output", "new", *FLAGS)
    code, _, err = recover(capsys, "short", *flags)
    assert code == 2 and "compensate compares layers with their parent's" in err
    code, _, err = recover(capsys, "short", "--method", "distill", *flags)
    assert code == 0 and "compensate is left out: the pruned model has other layers" in err, err
    assert not tiers[0].tasks and len(tiers[1].tasks) == 1


def test_a_killed_start_is_continued(tiers: tuple[Scale, Scale], capsys) -> None:
    arguments = ("run", "--method", "distill", "--output", "better")
    tiers[1].dies = True
    code, _, err = recover(capsys, *arguments)
    assert code == 130 and "run the same command again to resume from better" in err
    assert json.loads(Path("better/recover.json").read_text())["status"] == "running"
    code, _, err = recover(capsys, "better", "--output", "other")
    assert code == 2 and "an unfinished run" in err
    tiers[1].dies = False
    code, _, err = recover(capsys, *arguments)
    assert code == 0 and "compensate is finished: its weights are on record" in err
    assert [len(tier.tasks) for tier in tiers] == [1, 2]
    assert is_scaled("better/model", "run/model", 0.5)
    code, _, err = recover(capsys, *arguments, "--recover-tokens", 128)
    assert code == 2 and "holds another run (recover_tokens: None there, 128 here)" in err


def die_after_compensation() -> None:
    """The process kills itself when the first finished tier has been recorded."""
    patch = pytest.MonkeyPatch()
    install(patch, Scale("compensate"), Scale("distill", 0.25, TextWanted(256, 64)))
    rename = os.replace

    def rename_or_die(source: str, target: str) -> None:
        rename(source, target)
        is_record = str(target).endswith("finished.json")
        if is_record and json.loads(Path(target).read_text())["records"]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = rename_or_die


def test_kill_9_between_two_tiers(tiers: tuple[Scale, Scale], capsys, tmp_path: Path) -> None:
    arguments = ("run", "--method", "distill", "--output", "better")
    killed = start(
        "bonsai_fast.recover", *arguments, folder=tmp_path, before=die_after_compensation
    )
    code, _, err = killed.wait()
    assert code == -signal.SIGKILL, err
    code, _, err = recover(capsys, *arguments)
    assert code == 0 and "compensate is finished: its weights are on record" in err
    assert [len(tier.tasks) for tier in tiers] == [0, 1]
    assert is_scaled("better/model", "run/model", 0.5)


def test_streamed_as_in_memory(tiers: tuple[Scale, Scale], capsys) -> None:
    for name, flags in (("loaded", ()), ("streamed", ("--stream",))):
        code, _, err = recover(capsys, "run", "--output", name, *flags)
        assert code == 0, err
    assert is_scaled("streamed/model", "run/model", 2.0)
    files = [Path(name, "model", "model.safetensors") for name in ("loaded", "streamed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    results = [json.loads(Path(n, "recover.json").read_text()) for n in ("loaded", "streamed")]
    values = [result["result"]["pruned_perplexity"] for result in results]
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_from_python(tiers: tuple[Scale, Scale]) -> None:
    student = AutoModelForCausalLM.from_pretrained("run/model")
    config = bf.RecoverConfig(
        recover="distill", recover_tokens=128, num_sequences=4, sequence_length=32,
        evaluation_tokens=256, calibration="text.txt",
    )  # fmt: skip
    result = bf.recover(
        student, teacher=tiny_llama(), tokenizer=byte_tokenizer(), method="distill",
        config=config, output_dir="better", reporter=Reporter(quiet=True),
    )  # fmt: skip
    assert is_scaled("better/model", "run/model", 0.5)
    assert tiers[1].tasks[0].text.input_ids.numel() == 128
    assert result.parameters < result.parameters_dense and "before recovery" in repr(result)


def other_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained("narrow")


def other_head() -> None:
    tiny_llama(vocab_size=300, intermediate_size=96).save_pretrained("narrow")


def not_a_number() -> None:
    model = tiny_llama(intermediate_size=96)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained("narrow")


def quantised() -> None:
    path = Path("parent/config.json")
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "prepare, flags, message",
    [
        (other_vocabulary, (), "another vocabulary than its parent's (259 and 258 tokens)"),
        (other_head, (), "predicts 300 tokens, its parent 258"),
        (not_a_number, (), "the pruned model's weights hold NaN or Inf, first in model.layers.1"),
        (quantised, (), "parent is quantised: recover the model before quantisation"),
        (None, ("--method", "reconstruct"), "this version has no reconstruct"),
        (None, ("--method", "heal"), "method: expected one of compensate, reconstruct"),
        (None, ("--recover-tokens", 5), "recover_tokens: has no effect with recover=compensate"),
        (
            None,
            ("--method", "distill", "--recover-tokens", 0),
            "recover_tokens: expected at least 1",
        ),
        (None, ("--teacher", "nowhere"), "model nowhere cannot be loaded"),
        (None, ("--output", "parent"), "expected a new or empty directory"),
        (None, ("--num-sequences", 1), "num_sequences: expected at least 2"),
        (None, ("--num-sequences", 10**6), "text.txt' is too short"),
    ],
)
def test_refused_before_work(
    prepare, flags: tuple[object, ...], message: str, tiers: tuple[Scale, Scale], capsys
) -> None:
    uniform("narrow")
    if prepare is not None:
        prepare()
    words = ("narrow", "--teacher", "parent", "--output", "new", *FLAGS, *flags)
    code, out, err = recover(capsys, *words)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err, err
    assert err.count("\n") == 1 and not Path("new").exists() and not tiers[0].tasks


def test_a_parent_that_changed_is_refused(tiers: tuple[Scale, Scale], capsys) -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.data.mul_(2)
    model.save_pretrained("parent")
    code, _, err = recover(capsys, "run", "--output", "better")
    assert code == 2 and "parent is not the model that run/model was pruned from" in err


def test_no_model_there(tiers: tuple[Scale, Scale], capsys) -> None:
    Path("empty").mkdir()
    code, _, err = recover(capsys, "empty")
    assert code == 2 and "which holds no saved model" in err
    code, _, err = recover(capsys, "no/such-model", "--teacher", "parent")
    assert code == 2 and "model no/such-model cannot be loaded" in err


def test_plan_and_saved_options(tiers: tuple[Scale, Scale], capsys) -> None:
    words = ("run", "--method", "distill", "--recover-tokens", 128)
    code, out, err = recover(capsys, *words, "--plan", "--save-config", "run.yaml")
    assert code == 0 and not Path("run-distill").exists(), err
    assert json.loads(out)["recovery"]["distill"] == {"tokens": 128, "disk_bytes": 0}
    text = Path("run.yaml").read_text()
    assert "method: distill" in text and "recover_tokens: 128" in text and "seed: 3" in text
    code, again, _ = recover(capsys, "--config", "run.yaml")
    assert code == 0 and json.loads(again) == json.loads(out)


def test_help_of_a_method(capsys) -> None:
    code, out, _ = recover(capsys, "--method", "distill", "--help")
    assert code == 0 and "--recover-weights" in out and "--output" not in out
    assert "Only with" not in out and len(out.splitlines()) <= 60
