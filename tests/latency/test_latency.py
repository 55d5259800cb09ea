"""The latency command and what it is made of. Nothing is said of how long anything takes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import run_command
from tiny import save_tiny_parent, tiny_llama
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from bonsai_fast.checkpoints.load import LoadingOptions
from bonsai_fast.latency import __main__ as command
from bonsai_fast.latency import semi_structured, timing
from bonsai_fast.latency.__main__ import LatencyOptions, load_all, main, store
from bonsai_fast.latency.timing import Latency, PhaseTimes, Rounds, Workload, measure_rounds
from bonsai_fast.models.layout import Layout
from bonsai_fast.ops.native import wanda_keep
from bonsai_fast.surgery import remove_units, save_pretrained

QUICK = ["--rounds", "2", "--new", "2", "--prompt", "5"]


def two_of_four(model: torch.nn.Module) -> torch.nn.Module:
    """Half of every decoder weight gone, by magnitude."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                ones = torch.ones(module.in_features)
                module.weight.mul_(wanda_keep(module.weight, ones, n=2, m=4))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, a run whose model lacks units unevenly and a whole attention, and a 2:4 model."""
    where = tmp_path_factory.mktemp("models")
    save_tiny_parent(where / "parent")
    parent = tiny_llama()
    layout = Layout.of(parent)
    keep = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < 0.6
    first = next(group for group in layout.groups if group.kind == "head")
    keep[first.start : first.stop] = False
    save_pretrained(remove_units(parent, layout, keep), where / "run" / "model")
    two_of_four(tiny_llama()).save_pretrained(where / "zeros")
    return where


run = partial(run_command, main)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Time as it passes for models that need so many seconds a forward pass, by parameters."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(timing, "_now", lambda model: (now["seconds"], 2 * now["seconds"]))
    return now


def slow_down(model: torch.nn.Module, clock: dict[str, float], seconds: list[float]) -> None:
    """Let every pass take as long as the list says, in turn."""
    passes = iter(seconds)

    def spend(module: object, args: object, output: object) -> None:
        clock["seconds"] += next(passes)

    model.register_forward_hook(spend)


def test_table_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dirs = [folder / "parent", folder / "run", folder / "zeros", folder / "parent"]
    names = [*map(str, dirs[:3]), f"{dirs[0]} (2)"]
    code, out, err = run(capsys, *dirs, "--batch", "1,3", *QUICK)
    assert code == 0, err
    *table, last = out.splitlines()
    result = json.loads(last)
    assert result["device"] == "cpu" and result["rounds"] == 2 and result["threads"] == 1
    assert result["dtype"] == dict.fromkeys(names, "float32")
    rows = result["results"]
    assert [(row["model"], row["batch"]) for row in rows] == [(n, b) for b in (1, 3) for n in names]
    for row in rows:
        assert row["prefill_tokens"] == 5 and row["decode_tokens"] == 2
        first = next(other for other in rows if other["batch"] == row["batch"])
        for phase in ("prefill", "decode"):
            assert row[f"{phase}_tokens_per_s"] > 0 and row[f"{phase}_spread"] >= 0
            assert row[f"{phase}_speedup"] > 0 and first[f"{phase}_speedup"] == 1
        assert row["time_to_first_token_s"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= row["weight_bytes"]
    dense, pruned, zeros, again = rows[:4]
    assert pruned["parameters"] < dense["parameters"] == zeros["parameters"]
    assert dense["weight_bytes"] == again["weight_bytes"] > 4 * dense["parameters"]  # and buffers
    assert [row["storage"] for row in rows[:4]] == ["dense", "dense", "2:4 stored densely", "dense"]
    text = "\n".join(table)
    for word in ("prefill", "decode", "first token", "memory", "x1.00", "prompt 5", "2:4"):
        assert word in text
    assert "timing" in err and "timing" not in out


def test_defaults_fit_what_the_models_have_positions_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capsys, folder / "parent", "--rounds", 1, "--new", 3, "--dtype", "bfloat16"
    )
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["results"][0]["prefill_tokens"] == 128 - 3
    assert set(result["dtype"].values()) == {"bfloat16"}
    assert "2:4" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "model nowhere cannot be loaded"),
        (["parent", "nowhere"], "model nowhere cannot be loaded"),
        ([], "MODELS is missing"),
        (["parent", "--batch", "1,none"], "batch: expected positive numbers"),
        (["parent", "--batch", "0"], "batch: expected positive numbers"),
        (["parent", "--new", "0"], "new: expected at least 1, got 0"),
        (["parent", "--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["parent", "--threads", "-1"], "threads: expected at least 1"),
        (["parent", "--prompt", "127", "--new", "2"], "more than the 128 positions"),
        (["parent", "--new", "128"], "more than the 128 positions"),
        (["parent", "--device", "abacus"], "device: expected auto, cpu, cuda"),
        (["parent", "--dtype", "int3"], "int3"),
        (["zeros", "--semi-structured", "cutlass"], "cutlass: no 2:4 kernels on cpu"),
    ],
)
def test_bad_requests_get_one_line_and_exit_code_2(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and message in err


def test_cuda_without_memory_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate\n7 GiB")

    monkeypatch.setattr(command, "measure_latency", full)
    code, out, err = run(capsys, folder / "parent", "--batch", 4, *QUICK)
    assert code == 2 and not out
    # behind the progress bar, if any
    assert err.splitlines()[-1] == "error: batch 4: not enough memory: tried to allocate 7 GiB"


def test_threads_are_set_for_the_run_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = command.measure_latency

    def watched(*args: object, **kwargs: object) -> object:
        seen.append(torch.get_num_threads())
        return real(*args, **kwargs)

    monkeypatch.setattr(command, "measure_latency", watched)
    before = torch.get_num_threads()
    code, out, err = run(capsys, folder / "parent", "--threads", before + 1, *QUICK)
    assert code == 0, err
    assert seen == [before + 1] and torch.get_num_threads() == before
    assert json.loads(out.splitlines()[-1])["threads"] == before + 1


def test_a_name_that_is_a_directory_is_not_the_embedded_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(command, "load_model", lambda name, options: loaded.append(name))
    monkeypatch.chdir(folder)
    load_all([command.NAME], LoadingOptions())
    (folder / command.NAME).mkdir()
    load_all([command.NAME, "run"], LoadingOptions())
    (folder / command.NAME).rmdir()
    assert loaded == [None, command.NAME, "run/model"]


def test_models_take_turns_and_the_untimed_round_does_not_count(clock: dict[str, float]) -> None:
    """Seconds of every pass are known: warm-up (2 passes), a round for memory, two timed ones."""
    fast, slow = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    order: list[str] = []
    for name, model in {"fast": fast, "slow": slow}.items():
        model.register_forward_hook(lambda *_, n=name: order.append(n))
    untimed = [100.0] * 5
    slow_down(fast, clock, [*untimed, 1, 2, 2, 3, 4, 4])
    slow_down(slow, clock, [*untimed, 2, 6, 6, 9, 12, 12])
    steps: list[int] = []
    work = Workload(batch=3, prompt=5, new=2)
    measured = measure_rounds({"fast": fast, "slow": slow}, work, rounds=2, advance=steps.append)
    assert order == ["fast"] * 5 + ["slow"] * 5 + (["fast"] * 3 + ["slow"] * 3) * 2
    assert steps == [1] * 6
    assert measured["fast"].prefill.seconds == [1, 3] and measured["fast"].decode.seconds == [4, 8]
    assert measured["slow"].decode.processor_seconds == [24, 48]
    latency = Latency.of(measured["fast"], measured["slow"], work)
    assert latency.time_to_first_token_s == 2
    assert latency.prefill_tokens_per_s == 3 * 5 / 2 and latency.decode_tokens_per_s == 3 * 2 / 6
    assert latency.prefill_speedup == 2.5 and latency.decode_speedup == 3
    assert latency.prefill_spread == (2.5 - 1.5) / 2


def test_speedup_is_that_of_rounds_not_of_medians() -> None:
    """Another process slows both down in the second round and a third one hits one of them."""
    ours = PhaseTimes([1, 10, 1], [1, 1, 4])
    theirs = PhaseTimes([2, 20, 30], [3, 3, 3])
    assert ours.speedup_over(theirs) == 2
    assert ours.speedup_over(theirs, processor=True) == 3
    assert PhaseTimes([2]).spread == 0


def test_what_is_timed_is_greedy_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that are fed in are those that `generate` finds."""
    model = tiny_llama()
    fed: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    prompt = torch.randint(258, (2, 7), generator=torch.Generator().manual_seed(3))
    measure_rounds({"it": model}, Workload(batch=2, prompt=7, new=6), input_ids=prompt, rounds=1)
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt),
        max_new_tokens=7, min_new_tokens=7, do_sample=False,
    )  # fmt: skip
    first = len(fed) - 7 - 7  # the timed round, then generate's own passes
    assert torch.equal(torch.cat(fed[first : first + 7], dim=1), answer[:, :13])


def test_measuring_refuses_what_it_cannot_time() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        measure_rounds({}, Workload())
    with pytest.raises(ValueError, match=r"input_ids: expected \(1, 4\), got \(1, 5\)"):
        ids = torch.zeros(1, 5, dtype=torch.int64)
        measure_rounds({"it": tiny_llama()}, Workload(prompt=4, new=1), input_ids=ids)
    with pytest.raises(ValueError, match="prompt: expected at least 1, got 0"):
        Workload(prompt=0)


def test_a_model_keeps_its_mode() -> None:
    model = tiny_llama().train()
    measured = measure_rounds({"it": model}, Workload(prompt=3, new=1), rounds=1)
    assert model.training and isinstance(measured["it"], Rounds)


def test_two_of_four_is_told_from_other_zeros() -> None:
    weight = torch.tensor([[0.0, 1, 0, 2, 3, 0, 0, 0], [1, 2, 0, 0, 0, 0, 4, 5]])
    assert semi_structured.is_two_of_four(weight)
    weight[1, 2] = 1
    assert not semi_structured.is_two_of_four(weight)
    assert not semi_structured.is_two_of_four(torch.zeros(2, 6))
    model = two_of_four(tiny_llama())
    names = semi_structured.two_of_four_linears(model)
    assert len(names) == 4 * 7 and "lm_head" not in names
    assert semi_structured.two_of_four_linears(tiny_llama()) == []


def test_compressed_weights_are_the_same_numbers_in_less_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUTLASS's format is made without a GPU once PyTorch is not asked for one."""
    # multiples of 64, which the format asks for
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 1}
    model = two_of_four(tiny_llama(**sizes).bfloat16())
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = semi_structured.stored_bytes(model)
    names = semi_structured.two_of_four_linears(model)
    checked = "_validate_device_dim_dtype_shape"
    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, checked, lambda weight: None)
    monkeypatch.setattr(semi_structured, "why_not", lambda *_: None)
    options = LatencyOptions(semi_structured="cutlass")
    assert store(model, options) == "2:4 by cutlass"
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, SparseSemiStructuredTensorCUTLASS)
        assert torch.equal(weight.to_dense(), dense[f"{name}.weight"])
    compressed = sum(dense[f"{name}.weight"].nbytes for name in names)
    # half of the numbers, and 2 bits for each of those kept
    assert before - semi_structured.stored_bytes(model) == compressed // 2 - compressed // 16
    assert not isinstance(model.lm_head.weight, SparseSemiStructuredTensorCUTLASS)


def test_kernels_are_asked_for_by_name_or_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_of_four(tiny_llama())
    used: list[str] = []
    monkeypatch.setattr(command, "use_semi_structured", lambda model, name: used.append(name))
    assert store(model, LatencyOptions()) == "2:4 stored densely"
    monkeypatch.setattr(command, "why_not", lambda name, *_: None if name == "cutlass" else "old")
    assert store(model, LatencyOptions()) == "2:4 by cutlass"
    assert store(model, LatencyOptions(semi_structured="off")) == "2:4 stored densely"
    assert store(tiny_llama(), LatencyOptions()) == "dense"
    assert used == ["cutlass"]
    with pytest.raises(ValueError, match="no linear layer's weight is 2:4"):
        semi_structured.use_semi_structured(tiny_llama(), "cutlass")
