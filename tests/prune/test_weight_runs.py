"""Runs that zero weights: on updated activations, resumed to the same bytes, saved for anyone."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from commands import run_command
from families import FAMILIES
from forked import start
from tiny import byte_tokenizer, save_tiny_parent, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from weight_cases import pruned_run, pruned_weights, task_of

import bonsai_fast as bf
from bonsai_fast.checkpoints.streaming import exchanged_weights
from bonsai_fast.compare.__main__ import main as compare
from bonsai_fast.config.choices import CompareWithin
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model
from bonsai_fast.layerwise import sweep
from bonsai_fast.methods.weights import layer_by_layer
from bonsai_fast.methods.weights.layer_by_layer import WeightTask, linears_by_layer
from bonsai_fast.prune.__main__ import main
from bonsai_fast.prune.forecast import weight_plan
from bonsai_fast.runs.directory import WeightRun
from bonsai_fast.runs.layer_record import LayerRecord
from bonsai_fast.runs.ledger import LedgerError

QUIET = Reporter(quiet=True)
SMALL = {"num_sequences": 4, "sequence_length": 32, "evaluation_tokens": 256}
FLAGS = ["--num-sequences", "4", "--sequence-length", "32", "--evaluation-tokens", "256"]


@pytest.fixture(autouse=True)
def verified_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process takes seconds: one test has it, the others load again here."""

    def verify_saved(
        directory: Path, input_ids: torch.Tensor, expected: torch.Tensor, *, tolerance: float
    ) -> float:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(directory)(input_ids=input_ids).logits
        difference = float((logits.float() - expected).abs().max())
        assert difference <= tolerance
        return difference

    if request.function is not test_the_command_and_its_plan:
        monkeypatch.setattr(pruned_model, "verify_saved", verify_saved)


def prune(output: Path, model: PreTrainedModel | None = None, **options: Any) -> bf.SparseResult:
    config = bf.configure(**SMALL, **options)
    model = model or tiny_llama()
    result = bf.prune(model, byte_tokenizer(), config, output_dir=output, reporter=QUIET)
    assert isinstance(result, bf.SparseResult)
    return result


def by_hand(task: WeightTask, *, updated: bool) -> dict[str, torch.Tensor]:
    """Wanda with one whole forward pass a layer; each matrix sees all its inputs side by side."""
    model, found = task.model, {}
    assert task.calibration is not None
    for layer in task.layers:
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            linear.register_forward_pre_hook(
                lambda _, inputs, name=name, seen=seen: seen.update({name: inputs[0].flatten(0, 1)})
            )
            for name, linear in layer.items()
        ]
        with torch.no_grad():
            model(input_ids=task.calibration.input_ids)
        for hook in hooks:
            hook.remove()
        for name, linear in layer.items():
            metric = linear.weight.detach().abs() * seen[name].norm(p=2, dim=0)
            order = metric.argsort(dim=1)[:, : metric.shape[1] // 2]
            found[name] = linear.weight.detach().clone().scatter(1, order, 0)
            if updated:
                linear.weight.data = found[name]
    return found


def test_every_layer_sees_what_the_pruned_ones_hand_on(tmp_path: Path) -> None:
    """Activations of the dense model would choose other weights, from the second layer on."""
    options = {"method": "wanda", "pattern": "unstructured"}
    actual = pruned_weights(task_of(tiny_llama(), **options), tmp_path / "run")
    updated = by_hand(task_of(tiny_llama(), **options), updated=True)
    dense = by_hand(task_of(tiny_llama(), **options), updated=False)
    assert actual.keys() == updated.keys()
    assert all(torch.equal(actual[name], updated[name]) for name in actual)
    same = {name for name in actual if torch.equal(actual[name], dense[name])}
    assert {name for name in actual if ".layers.0." in name} <= same
    assert not any(".layers.3." in name for name in same)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_its_fused_projections(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sweep.MAX_TOKENS, "cpu", 24)
    for method in ("wanda", "sparsegpt"):
        if method == "sparsegpt" and family not in ("llama3", "phi3", "bloom", "opt"):
            continue
        model = FAMILIES[family]()
        before = {name: x.clone() for name, x in model.named_parameters()}
        task = task_of(model, method=method, pattern="2:4")
        weights = pruned_weights(task, tmp_path / method)
        assert weights.keys() == {
            f"{path}.weight"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path.count(".") > 2
        }
        for name, weight in weights.items():
            assert ((weight == 0).view(-1, 4).sum(1) == 2).all(), name
            unchanged = torch.equal(weight[weight != 0], before[name][weight != 0])
            assert unchanged == (method == "wanda"), name
        assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


def test_a_model_that_lost_units_before(tmp_path: Path) -> None:
    """Layers of other widths, one of them without its attention."""
    parent = tiny_llama()
    layout = bf.Layout.of(parent, sublayers=True)
    keep = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < 0.8
    for number, unit in enumerate(layout.units):
        if unit.kind in ("attention", "mlp"):
            keep[number] = (unit.layer, unit.kind) != (1, "attention")
    smaller = bf.remove_units(parent, layout, keep)
    weights = pruned_weights(task_of(smaller, method="wanda"), tmp_path / "run")
    assert weights.keys() == {
        name for name, x in smaller.named_parameters() if x.dim() == 2 and ".layers." in name
    }
    for name, weight in weights.items():
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all(), name


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude"},
        {"method": "wanda", "pattern": "4:8"},
        {"method": "sparsegpt", "sparsity": 0.3},
        {"method": "wanda", "weight_update": True, "compare_within": "layer"},
        {"method": "sparsegpt", "weight_update": False, "calibration": "self"},
    ],
    ids=lambda options: "-".join(str(x) for x in options.values()),
)
def test_zeros_are_counted_and_survive(options: dict[str, Any], tmp_path: Path) -> None:
    parent = tiny_llama()
    before = {name: x.clone() for name, x in parent.named_parameters()}
    result = prune(tmp_path / "run", parent, **options)
    assert all(torch.equal(x, before[name]) for name, x in parent.named_parameters())
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert type(model) is type(parent) and model.config.model_type == "llama"
    linears = {name: x for layer in linears_by_layer(model) for name, x in layer.items()}
    zeros = sum(int((x.weight == 0).sum()) for x in linears.values())
    assert result.zeros == zeros and result.zeros_dense == 0
    assert result.weights == sum(x.weight.numel() for x in linears.values())
    # widths of 48, 32 and 128 round down
    assert options.get("sparsity", 0.5) - 0.01 < result.sparsity <= options.get("sparsity", 0.5)
    others = before.keys() - linears.keys()
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in others)
    assert result.pruned_perplexity != result.dense_perplexity > 0
    card = (Path(result.output) / "README.md").read_text()
    measured = f"{result.dense_perplexity:.2f} | {result.pruned_perplexity:.2f}"
    assert f"| perplexity | {measured} |" in card
    assert f"pattern `{result.pattern}`" in card
    files = {path.name for path in Path(result.output).iterdir()}
    assert not {name for name in files if name.endswith(".py")} and "tokenizer.json" in files
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"run.json", "model", "report.html"}


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    result = prune(tmp_path / "run", tiny_llama().bfloat16(), method="sparsegpt", pattern="2:4")
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert model.dtype == torch.bfloat16 and result.sparsity == 0.5


def test_a_layer_that_is_missing_is_not_passed_over(tmp_path: Path) -> None:
    """The parent's own weights in its place would look like a pruned layer."""
    task = task_of(tiny_llama(), method="magnitude")
    run = pruned_run(task, tmp_path / "run")
    before = {name: x.clone() for name, x in task.model.named_parameters()}
    (run.path / "layers" / "0002.safetensors").unlink()
    with (
        pytest.raises(LedgerError, match=r"0002.safetensors is missing; run the same command"),
        exchanged_weights(task.model, run.layers.__getitem__),
    ):
        pass
    assert all(torch.equal(x, before[name]) for name, x in task.model.named_parameters())


class Interrupted(Exception):
    """Stands for the end of the process."""


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """The call after `calls` ones does not come back."""
    real, count = getattr(owner, name), []

    def once(*arguments: Any, **keywords: Any) -> Any:
        count.append(name)
        if len(count) > calls:
            raise Interrupted
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, once)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return Path(prune(tmp_path_factory.mktemp("whole") / "run", method="sparsegpt").run)


def weights_in(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (LayerRecord, "save", 2),
        (pruned_model, "save_pretrained", 0),
        (WeightRun, "record", 1),
        (LayerRecord, "drop", 0),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".")[2],
)
def test_interrupted_runs_go_on_to_the_same_bytes(
    owner: Any, name: str, calls: int, whole: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, name, calls)
        with pytest.raises(Interrupted):
            prune(tmp_path / "run", method="sparsegpt")
    on_record = len(list((tmp_path / "run").glob("layers/*.safetensors")))
    assert on_record == (calls if name == "save" else 4)
    result = prune(tmp_path / "run", method="sparsegpt")
    assert weights_in(tmp_path / "run") == weights_in(whole)
    assert not (tmp_path / "run" / "layers").exists()
    if name != "drop":  # by then the run was finished
        fresh = json.loads((whole / "run.json").read_text())["result"]
        assert result.pruned_perplexity == fresh["pruned_perplexity"]
        assert (result.tokens > 0) == (name == "save")


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["loaded", "streamed"])
def test_a_kill_and_a_resume_give_the_same_bytes(stream: list[str], tmp_path: Path) -> None:
    parent = save_tiny_parent(tmp_path / "parent", num_hidden_layers=12)
    flags = ["--method", "sparsegpt", "--pattern", "2:4", *FLAGS, "--output", str(tmp_path / "run")]
    process = start("bonsai_fast.prune", parent, *flags, *stream, folder=tmp_path)
    while process.runs and len(list((tmp_path / "run").glob("layers/0*.safetensors"))) < 3:
        time.sleep(0.002)
    assert process.runs, "it was finished before it could be killed"
    process.kill()
    done = len(list((tmp_path / "run").glob("layers/*.safetensors")))
    assert 3 <= done < 12
    assert main([str(parent), *flags, *stream]) == 0
    assert main([str(parent), *flags[:-1], str(tmp_path / "whole")]) == 0
    assert weights_in(tmp_path / "run") == weights_in(tmp_path / "whole")


def test_a_finished_run_is_measured_again_without_pruning(tmp_path: Path) -> None:
    first = prune(tmp_path / "run", method="wanda")
    before = weights_in(tmp_path / "run")
    again = prune(tmp_path / "run", method="wanda")
    assert again == first
    config = bf.PruneConfig(**{**SMALL, "evaluation_tokens": 512}, method="wanda")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, layer_by_layer, "prune_layer", 0)
        other = bf.prune(tiny_llama(), byte_tokenizer(), config, output_dir=tmp_path / "run",
                         reporter=QUIET)  # fmt: skip
    assert other.protocol["tokens"] > first.protocol["tokens"]
    assert weights_in(tmp_path / "run") == before


def test_another_request_does_not_overwrite_a_run(tmp_path: Path) -> None:
    prune(tmp_path / "run", method="magnitude")
    before = weights_in(tmp_path / "run")
    for options, message in (
        ({"method": "magnitude", "pattern": "2:4"}, "pattern: 'unstructured' there, '2:4' here"),
        ({"method": "wanda"}, "method: 'magnitude' there, 'wanda' here"),
        ({"method": "magnitude", "sparsity": 0.4}, "sparsity: 0.5 there, 0.4 here"),
    ):
        with pytest.raises(ValueError, match=f"holds another run .*{message}"):
            prune(tmp_path / "run", **options)
    with pytest.raises(ValueError, match="holds another run"):
        config = bf.PruneConfig(**SMALL, sparsity=0.2)
        bf.prune(tiny_llama(), byte_tokenizer(), config, output_dir=tmp_path / "run")
    assert weights_in(tmp_path / "run") == before


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_parent(tmp_path_factory.mktemp("parent"))


command = partial(run_command, main)


def test_the_command_and_its_plan(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--method", "wanda", "--pattern", "2:4", *FLAGS]
    code, out, err = command(capsys, parent, *flags, "--plan")
    plan = json.loads(out.splitlines()[-1])
    assert code == 0 and not list(tmp_path.iterdir())
    assert plan["layers"] == 4 and plan["tokens"] == 2 * 4 * 32 and plan["seconds"] > 0
    for word in ("zeros", "50.00%", "4 neighbours", "forward tokens", "minutes"):
        assert word in err
    code, out, err = command(capsys, parent, *flags)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["output"] == f"runs/{parent.name}-wanda-2-4/model"
    assert result["zeros"] == plan["zeros"] and result["weights"] == plan["weights"]
    for word in ("zeros", "perplexity", "same logits", "50.00%"):
        assert word in err


@pytest.mark.parametrize("within", get_args(CompareWithin))
def test_planned_zeros_are_those_that_come(within: CompareWithin, tmp_path: Path) -> None:
    model = tiny_llama(intermediate_size=136)
    task = task_of(model, method="magnitude", sparsity=0.37, compare_within=within)
    weights = pruned_weights(task, tmp_path / "run")
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert weight_plan(task).zeros == zeros


BAD = {
    "2:4 at another sparsity": ("--method wanda --pattern 2:4 --sparsity 0.6", "removes 0.5"),
    "pattern turned round": ("--method wanda --pattern 4:2", "N:M with 0 < N < M"),
    "pattern in words": ("--method wanda --pattern half", "expected unstructured or N:M"),
    "pattern that does not divide": ("--method wanda --pattern 3:7", "that 7 divides, got 48"),
    "pattern of units": (
        "--method bonsai --pattern 2:4",
        "method bonsai does not read it",
    ),
    "pattern without a method": ("--pattern 2:4", "it is read by magnitude, wanda, sparsegpt"),
    "groups of a pattern": (
        "--method wanda --pattern 2:4 --compare-within output",
        "method wanda with pattern=2:4 does not read it",
    ),
    "unknown groups": (
        "--method wanda --compare-within row",
        "compare_within: expected one of layer, input",
    ),
    "units of wanda": ("--method wanda --rounds 3", "rounds: method wanda does not read it"),
    "target of wanda": (
        "--method wanda --target params=50K",
        "method wanda zeroes weights",
    ),
    "sparsity of 1": ("--method sparsegpt --sparsity 1", "expected a fraction in (0, 1)"),
    "tiny budget": ("--method wanda --memory-budget 1KB", "one sequence of"),
    "no text": ("--method wanda --calibration none.txt", "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_end_in_one_line(
    name: str, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = BAD[name]
    code, out, err = command(capsys, parent, *FLAGS, *flags.split(), "--output", tmp_path / "run")
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not list(tmp_path.rglob("*"))


def test_methods_compared_remove_units(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--methods", "wanda", *FLAGS, "--output", str(tmp_path / "all")]
    assert compare([str(parent), *flags]) == 2
    assert "expected methods that remove units, wanda zeroes weights" in capsys.readouterr().err


def test_overflow_and_damage_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(1e38)
    model.save_pretrained(tmp_path / "parent")
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    arguments = [tmp_path / "parent", *FLAGS, "--method", "wanda", "--output", tmp_path / "run"]
    code, out, err = command(capsys, *arguments)
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert last.startswith("error: ") and "layers.2.mlp.down_proj.weight: its inputs" in last
    (tmp_path / "run" / "layers" / "0001.safetensors").write_bytes(b"rubbish")
    code, _, err = command(capsys, *arguments)
    assert code == 2 and "0001.safetensors cannot be read" in err.splitlines()[-1]
