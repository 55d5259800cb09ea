"""Layers are trained to give their parent's residual, and nothing else changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, llama, opt
from surgery_cases import bytes_of, logits_of, pruned
from tiny import byte_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import exchanged_weights, stream_layers
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences, sample_text
from bonsai_fast.models.layout import Layout
from bonsai_fast.recovery import RecoveryTask
from bonsai_fast.recovery.reconstruct import (
    Reconstruct,
    layer_training,
    reconstruct_tier,
    training_budget,
)
from bonsai_fast.recovery.reconstruct.layer_outcomes import LayerOutcomes
from bonsai_fast.recovery.reconstruct.layer_training import (
    LayerOutcome,
    LayerTraining,
    train_layer,
)
from bonsai_fast.recovery.reconstruct.prefixes import Prefixes
from bonsai_fast.runs.layer_record import LayerRecord
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.surgery import remove_units

# a batch is two sequences
LENGTH, BATCH_TOKENS = 16, 32


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_budget, "BATCH_TOKENS", BATCH_TOKENS)


def text_of(teacher: PreTrainedModel, sequences: int, seed: int) -> Sequences:
    """Text that the teacher expects, so that a student nearer to it has a lower loss."""
    ids = sample_text(teacher, num_sequences=sequences, length=LENGTH, seed=seed)
    return Sequences(ids, "self", "sampled")


def task_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    *,
    steps: int = 12,
    **more: Any,
) -> RecoveryTask:
    folder.mkdir(exist_ok=True)
    whole = more.pop("sampler", teacher)
    return RecoveryTask(
        **{
            "student": student,
            "teacher": teacher,
            "tokenizer": byte_tokenizer(),
            "text": text_of(whole, 96, 0),
            "held_out": text_of(whole, 8, 1),
            "options": RecoverOptions(recover="reconstruct", recover_tokens=steps * BATCH_TOKENS),
            "seed": 3,
            "folder": folder,
            "reporter": Reporter(quiet=True),
            **more,
        }
    )


def bits_of(model: PreTrainedModel) -> dict[str, bytes]:
    return {name: bytes_of(tensor.detach()) for name, tensor in model.state_dict().items()}


def outcomes(folder: Path) -> list[LayerOutcome]:
    return list(LayerOutcomes.read(folder).layers.values())


def doubled_llama() -> PreTrainedModel:
    """The second half of its channels are copies of the first."""
    model = llama()
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.data[20:] = projection.weight.data[:20]
    return model


def test_what_can_be_restored_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a channel is removed: its twin can do the work of both."""
    monkeypatch.setattr(training_budget, "BATCH_TOKENS", 8 * BATCH_TOKENS)
    monkeypatch.setattr(training_budget, "LEARNING_RATE", 3e-2)
    teacher = doubled_llama()
    layout = Layout.of(teacher)
    keep = torch.tensor([unit.kind != "channel" or unit.index < 20 for unit in layout])
    student = remove_units(teacher, layout, keep)
    task = task_of(student, teacher, tmp_path, steps=8 * 150)
    before = logits_of(student, task.held_out.input_ids)
    record = Reconstruct().run(task)
    wanted = logits_of(teacher, task.held_out.input_ids)
    found = logits_of(student, task.held_out.input_ids)
    assert outcomes(tmp_path)[0].after < 5e-2 * outcomes(tmp_path)[0].before
    assert (found - wanted).square().mean() < 5e-2 * (before - wanted).square().mean()
    assert record.held_out_after < record.held_out_before and record.notes == []
    nll = SequenceNLL(student)(task.held_out.input_ids)
    assert record.held_out_after == pytest.approx(float(nll.mean()), rel=1e-4)
    # each layer was trained on the same number of tokens, and the whole saw as many
    assert record.tokens == record.settings["tokens_per_layer"] == 8 * 150 * BATCH_TOKENS
    assert [point.tokens for point in record.curve] == [12800, 25600, 38400]
    assert record.curve[0].loss > 0 and record.seconds > 0


@pytest.mark.parametrize("family", ["llama3", "bloom"])
def test_targets_and_errors_are_what_they_say(family: str, tmp_path: Path) -> None:
    """Against Hugging Face's own hidden states, and a layer that is given the student's."""
    teacher, student = FAMILIES[family](), pruned(family, "most")
    ids = text_of(teacher, 5, 0).input_ids
    both = Prefixes.of(student, teacher, ids, memory_budget=2**26, folder=tmp_path)
    both.advance_teacher(0, aims=False)
    both.advance_student(0, {})
    both.advance_teacher(1, aims=True)
    with torch.no_grad():
        passed = [
            model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for model in (student, teacher)
        ]
        layer = teacher.get_submodule(Layout.of(teacher).decoder.path)[1]
        layer.register_forward_pre_hook(lambda _, inputs: (passed[0][1], *inputs[1:]))
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
        seen: list[Any] = []
        teacher(ids, use_cache=False)
    there = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    targets = 0.5 * there + 0.5 * passed[1][2]
    torch.testing.assert_close(both.targets[slice(None)], targets, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([3, 0])
    weights = dict(both.student.layers[1].named_parameters())
    naive = [
        float((passed[0][2][row, token] - targets[row, token]).square().mean())
        / float(targets[row, token].square().mean())
        for row in rows.tolist()
        for token in range(LENGTH)
    ]
    with torch.no_grad():
        found = float(both.error(1, weights, rows))
        parts = [float(both.error(1, weights, slice(row, row + 1))) for row in range(5)]
    assert found == pytest.approx(sum(naive) / len(naive), rel=1e-4)
    whole = both.mean_error(1, weights, 5, 2)
    assert whole == pytest.approx(sum(parts) / 5, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Also a layer without sub-layers; embeddings, head, norm and teacher keep their bits."""
    teacher, student = FAMILIES[family](), pruned(family, "middle layer gone")
    old, parent = bits_of(student), bits_of(teacher)
    record = Reconstruct().run(task_of(student, teacher, tmp_path))
    inside = f"{Layout.of(student).decoder.path}."
    new = bits_of(student)
    assert {name for name in old if old[name] != new[name]} <= {
        name for name in old if name.startswith(inside)
    }
    assert bits_of(teacher) == parent
    assert all(x.grad is None and x.requires_grad for x in student.parameters())
    assert all(x.grad is None for x in teacher.parameters())
    found = outcomes(tmp_path)
    assert found[0].is_better and found[0].steps == 12
    # OPT, BLOOM and the like leave biases in the middle layer
    names = [name for name, _ in student.named_parameters() if name.startswith(f"{inside}1.")]
    assert found[1].is_trainable == bool(names) and (found[1].steps > 0) == bool(names)
    # with a layer removed, a tiny random model may get worse as a whole
    assert (old != new) == (record.held_out_after < record.held_out_before)
    assert old != new or family == "gemma"


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_streamed_models_give_the_same_bits(family: str, tmp_path: Path) -> None:
    """Also where an earlier tier has recorded other weights for a layer."""
    teacher, student = FAMILIES[family](), pruned(family, "most")
    name = next(name for name, x in student.named_parameters() if ".1." in name and x.dim() == 2)
    earlier = {1: {name: 0.9 * student.get_parameter(name).detach()}}
    student.get_parameter(name).data.mul_(0.9)
    first = Reconstruct().run(task_of(student, teacher, tmp_path / "memory"))
    streamed = stream_layers(pruned(family, "most"), device="cpu")
    parent = stream_layers(FAMILIES[family](), device="cpu")
    task = task_of(streamed, parent, tmp_path / "streamed", sampler=teacher)
    with exchanged_weights(streamed, earlier.get):
        second = Reconstruct().run(task)
    assert second.held_out_after == first.held_out_after
    layers = LayerRecord(task.folder / "layers")
    new = {name: tensor for number in range(3) for name, tensor in layers[number].items()}
    assert new and all(torch.equal(student.get_parameter(name), new[name]) for name in new)


def test_bfloat16(tmp_path: Path) -> None:
    teacher, student = llama().bfloat16(), pruned("llama", "most").bfloat16()
    record = Reconstruct().run(task_of(student, teacher, tmp_path, steps=60))
    assert record.held_out_after < record.held_out_before
    assert {x.dtype for x in student.parameters()} == {torch.bfloat16}
    assert outcomes(tmp_path)[0].is_better


class Killed(BaseException):
    """What stands for kill -9."""


def test_an_interrupted_start_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, whole = llama(), pruned("llama", "most")
    Reconstruct().run(task_of(whole, teacher, tmp_path / "whole"))
    student = pruned("llama", "most")
    old, trained = bits_of(student), []

    def train(text: Any, held_out: Any, number: int, *rest: Any, **more: Any) -> Any:
        if trained == [0]:
            raise Killed
        trained.append(number)
        return train_layer(text, held_out, number, *rest, **more)

    monkeypatch.setattr(reconstruct_tier, "train_layer", train)
    task = task_of(student, teacher, tmp_path / "resumed")
    with pytest.raises(Killed):
        Reconstruct().run(task)
    assert bits_of(student) == old
    trained.append(-1)
    record = Reconstruct().run(task)
    assert trained == [0, -1, 1, 2]
    assert bits_of(student) == bits_of(whole) != old
    assert [each.layer for each in outcomes(task.folder)] == [0, 1, 2]
    assert record.tokens == 12 * BATCH_TOKENS


def poisoned(worse: float) -> Callable[..., Any]:
    """Training that reports success and returns noise."""

    def train(_: Any, __: Any, number: int, weights: dict[str, Tensor], *rest: Any, **more: Any):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(number)
        noise = {
            name: x.detach() + worse * torch.randn(x.shape, generator=generator)
            for name, x in weights.items()
        }
        return noise, LayerOutcome(number, 1.0, 0.5, 0.7, 12)

    return train


@pytest.mark.parametrize("worse", [1.0, float("nan")])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_worse_model_gets_its_weights_back(
    worse: float, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruct_tier, "train_layer", poisoned(worse))
    teacher, student = llama(), pruned("llama", "most")
    old = bits_of(student)
    student = stream_layers(student, device="cpu") if streamed else student
    task = task_of(student, teacher, tmp_path)
    record = Reconstruct().run(task)
    assert record.held_out_after == record.held_out_before
    assert len(record.notes) == 1 and "all layers keep their weights: with the" in record.notes[0]
    assert [LayerRecord(tmp_path / "layers").find(number) for number in range(3)] == [{}, {}, {}]
    assert streamed or bits_of(student) == old
    # a start after that knows it
    monkeypatch.setattr(reconstruct_tier, "train_layer", None)
    assert Reconstruct().run(task).notes == record.notes


def test_a_layer_that_gets_worse_keeps_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_budget, "LEARNING_RATE", 100.0)
    teacher, student = llama(), pruned("llama", "most")
    old = bits_of(student)
    record = Reconstruct().run(task_of(student, teacher, tmp_path))
    assert bits_of(student) == old and record.held_out_after == record.held_out_before
    assert record.notes == [
        "layers that keep their weights, because training did not bring their output closer to "
        "the parent's on held-out text: 0, 1, 2"
    ]
    assert not any(each.is_better for each in outcomes(tmp_path))


def test_no_more_time_than_allowed(tmp_path: Path) -> None:
    teacher, student = llama(), pruned("llama", "most")
    task = task_of(student, teacher, tmp_path, steps=100_000)
    options = replace(task.options, recover_minutes=2 / 60)
    record = Reconstruct().run(replace(task, options=options))
    assert record.seconds < 4
    assert 0 < record.tokens < 100_000 * BATCH_TOKENS
    (note,) = [note for note in record.notes if "time was up" in note]
    assert "of 300,000 steps" in note
    assert record.held_out_after < record.held_out_before


def test_zeroed_weights_stay_zero(tmp_path: Path) -> None:
    teacher = llama()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, x in student.named_parameters():
            if x.dim() == 2 and "layers" in name:
                x[torch.rand(x.shape, generator=torch.Generator().manual_seed(len(name))) < 0.5] = 0
    zeros = {name: x == 0 for name, x in student.named_parameters() if "layers" in name}
    record = Reconstruct().run(task_of(student, teacher, tmp_path))
    assert record.held_out_after < record.held_out_before
    assert sum(int(zero.sum()) for zero in zeros.values()) > 10_000
    assert all(torch.equal(student.get_parameter(name) == 0, zero) for name, zero in zeros.items())


def test_steps_fit_the_weights(tmp_path: Path) -> None:
    """The first step of Adam moves each weight by the learning rate times its tensor's scale."""
    teacher, student = llama(), pruned("llama", "most")
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(0.01)
    text = text_of(teacher, 4, 0).input_ids
    both = Prefixes.of(student, teacher, text, memory_budget=2**26, folder=tmp_path)
    both.advance_teacher(0, aims=True)
    weights = dict(both.student.layers[0].named_parameters())
    how = LayerTraining(steps=1, batch=4, learning_rate=0.02, checks=1, held_out=4, seed=0)
    new, outcome = train_layer(both, both, 0, weights, how)
    assert outcome.is_better and new.keys() == weights.keys()
    for name, x in weights.items():
        wanted = 0.02 * max(float(x.detach().square().mean().sqrt()), 0.01)
        assert float((new[name] - x.detach()).abs().median()) == pytest.approx(wanted, rel=0.05)
    assert layer_training._scale(torch.ones(7, 4 * 576)) == 0.5
    assert layer_training._scale(torch.ones(4 * 576)) == 1.0


def with_layers(count: int) -> PreTrainedModel:
    model = llama()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    return type(model)(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student": lambda: with_layers(2)},
            r"as many layers in .* as in its parent \(3\), got 2",
        ),
        ({"student": opt}, r"as many hidden states .* \(48\), got 40"),
        ({"student": lambda: llama().half()}, "bfloat16 or float32, got torch.float16 in"),
        ({"tokens": 31}, "batches of 2 x 16 tokens, expected at least 32, got 31"),
        ({"tokens": 0}, "expected at least 32, got 0"),
        ({"text": torch.zeros(0, 16, dtype=torch.int64)}, "the text is too short, .* got 0 x 16"),
        ({"held_out": torch.zeros(3, 1, dtype=torch.int64)}, "held-out text is too short"),
        ({"held_out": torch.full((3, 16), 97)}, "holds token 97, but the models know 97"),
        ({"memory_budget": 1000}, "one sequence of 16 tokens needs .* a sixth of the whole"),
    ],
)
def test_refused_before_any_work(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = llama()
    task = task_of(change.pop("student", llama)(), teacher, tmp_path)
    if "tokens" in change:
        options = RecoverOptions(recover="reconstruct")
        object.__setattr__(options, "recover_tokens", change.pop("tokens"))
        change["options"] = options
    texts = {
        name: Sequences(change.pop(name), "a file", "all of it")
        for name in ("text", "held_out")
        if name in change
    }
    with pytest.raises(ValueError, match=message):
        Reconstruct().run(replace(task, **texts, **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_quantized_models_are_refused(which: str, tmp_path: Path) -> None:
    models = {"student": llama(), "teacher": llama()}
    task = task_of(**models, folder=tmp_path)
    models[which].config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="is quantized; expected weights in bfloat16 or float32"):
        Reconstruct().check(task)


def test_work_is_planned_as_it_is_done(tmp_path: Path) -> None:
    teacher, student = llama(), pruned("llama", "most")
    task = task_of(student, teacher, tmp_path, steps=7)
    plan = Reconstruct().plan(task)
    record = Reconstruct().run(task)
    assert plan.tokens == record.tokens == 7 * BATCH_TOKENS
    written = sum(path.stat().st_size for path in (tmp_path / "layers").iterdir())
    assert 0 < written < 1.1 * plan.disk_bytes
    assert json.loads((tmp_path / "reconstruct.json").read_text())["rejected"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_on_a_gpu(family: str, tmp_path: Path) -> None:
    """Models on the GPU, and models that visit it layer by layer."""
    sampler = FAMILIES[family]()
    losses = []
    for folder in ("memory", "streamed"):
        student, teacher = pruned(family, "most"), FAMILIES[family]()
        student, teacher = (
            (student.cuda(), teacher.cuda())
            if folder == "memory"
            else (stream_layers(student, device="cuda"), stream_layers(teacher, device="cuda"))
        )
        record = Reconstruct().run(task_of(student, teacher, tmp_path / folder, sampler=sampler))
        assert record.held_out_after < record.held_out_before and record.peak_bytes
        losses.append(record.held_out_after)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
