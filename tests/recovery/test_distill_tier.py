"""Training tiny pruned models: what is trained, what stays, and what is reported."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from training_cases import LENGTH, parent, pruned, text_of, tiny_task, tiny_text, train, weights_of

import bonsai_fast as bf
from bonsai_fast.recovery import TrainingError
from bonsai_fast.recovery.distill import (
    DistillTier,
    layer_checkpointing,
    training_clock,
    training_loop,
)
from bonsai_fast.recovery.distill.processes import Processes
from bonsai_fast.recovery.distill.teacher_states import CachedStates, LiveStates
from bonsai_fast.scoring import SequenceNLL


@pytest.mark.parametrize("weights", ["lora", "all", "norms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_within_20_steps(tmp_path, weights, dtype):
    student, teacher = pruned(parent()).to(dtype), parent().to(dtype)
    before, modules = weights_of(student), [type(x) for x in student.modules()]
    options = {"recover_weights": weights, "recover_batch": 4, "recover_tokens": 80 * LENGTH}
    if weights == "norms":
        options["recover_rate"] = 1e-2
    task = tiny_task(tmp_path, student=student, teacher=teacher, options=options)
    record = train(task)
    assert record.settings["optimiser_steps"] == 20
    losses = [point.loss for point in record.curve]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert record.held_out_after < record.held_out_before
    changed = {name for name, x in student.named_parameters() if not torch.equal(x, before[name])}
    assert changed and not any("embed" in name or "lm_head" in name for name in changed)
    if weights == "norms":
        assert all("norm" in name for name in changed)
    elif weights == "lora":
        assert all("_proj" in name for name in changed)
    # nothing of the training stays
    assert [type(x) for x in student.modules()] == modules and not hasattr(student, "peft_config")
    assert all(x.dtype == dtype and x.requires_grad for x in student.parameters())
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_every_family_are_merged_without_loss(tmp_path, family):
    """The logits after the merge are those that were trained."""
    teacher, student = FAMILIES[family](), pruned(FAMILIES[family]())
    text = text_of(teacher, 4, seed=1, length=9)
    options = {"recover_tokens": 16 * 9, "recover_batch": 4, "recover_cross_entropy": 1.0}
    # measured on the text itself, on which it must get better
    texts = {"text": text, "held_out": text}
    task = tiny_task(tmp_path, student=student, teacher=teacher, options=options, **texts)
    record = train(task)
    assert record.settings["largest_logit_change_by_merge"] < 1e-3
    assert record.curve[-1].held_out < record.held_out_before
    assert record.held_out_after == pytest.approx(record.curve[-1].held_out, abs=1e-4)


def test_weights_that_were_worse_on_held_out_text_are_not_kept(tmp_path):
    """A learning rate that ruins the model: it ends as it began."""
    options = {"recover_rate": 0.3, "recover_tokens": 40 * LENGTH}
    task = tiny_task(tmp_path, held_out=tiny_text(4, seed=2), options=options)
    before = weights_of(task.student)
    record = train(task)
    assert record.held_out_after == pytest.approx(record.held_out_before, abs=1e-6)
    for name, parameter in task.student.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert "after step 0" in " ".join(record.notes)
    assert "no better on held-out text" in " ".join(record.notes)


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path):
    task = tiny_task(tmp_path)
    task.teacher.get_submodule("model.norm").weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="is nan in step 1; train with a lower"):
        DistillTier("distill").run(task)
    assert not hasattr(task.student, "peft_config")


def test_cached_states_are_live_ones_to_the_bit(tmp_path):
    teacher, text = parent().bfloat16(), tiny_text(5, seed=1)
    live = LiveStates(SequenceNLL(teacher), text.input_ids)
    shape = (5, LENGTH, 48)
    processes = Processes(torch.device("cpu"))
    options = {"device": torch.device("cpu"), "processes": processes}
    cache = CachedStates(tmp_path, shape, torch.bfloat16, identity={"text": "a"}, **options)
    cache.fill(live, rows=2, advance=lambda _: None)
    numbers = torch.tensor([3, 0, 4])
    expected = teacher.model(input_ids=text.input_ids[3:4]).last_hidden_state
    assert torch.equal(cache(numbers), live(numbers)) and torch.equal(cache(numbers)[:1], expected)
    # another start reads them; another text does not
    again = CachedStates(tmp_path, shape, torch.bfloat16, identity={"text": "a"}, **options)
    assert again.filled == 5 and torch.equal(again(numbers), live(numbers))
    other = CachedStates(tmp_path, shape, torch.bfloat16, identity={"text": "b"}, **options)
    assert other.filled == 0


def test_a_cached_parent_trains_the_same_model_to_the_bit(tmp_path):
    results = []
    for how in ("live", "cached"):
        options = {"recover_teacher": how, "recover_tokens": 6 * LENGTH, "recover_batch": 2}
        task = tiny_task(tmp_path / how, options=options)
        assert train(task).settings["teacher"] == how
        results.append(weights_of(task.student))
    for name, parameter in results[0].items():
        assert torch.equal(parameter, results[1][name]), name


def test_text_that_is_read_again_is_cached(tmp_path):
    """Not with a time limit, in which most of it may never be read."""
    few = {"text": tiny_text(3, seed=1)}
    assert train(tiny_task(tmp_path / "a", **few)).settings["teacher"] == "cached"
    limited = {"recover_tokens": 4 * LENGTH, "recover_minutes": 100.0}
    record = train(tiny_task(tmp_path / "b", **few, options=limited))
    assert record.settings["teacher"] == "live"
    streamed = bf.stream_layers(parent())
    record = train(tiny_task(tmp_path / "c", teacher=streamed, options={"recover_tokens": 34}))
    assert record.settings["teacher"] == "cached"


def test_the_plan_says_what_is_written(tmp_path):
    task = tiny_task(tmp_path, options={"recover_teacher": "cached", "recover_batch": 3})
    plan = DistillTier("distill").plan(task)
    assert plan.tokens == 6 * LENGTH
    assert plan.tokens == train(task).tokens
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 24 * LENGTH * 48 * 4 < written < plan.disk_bytes + 50_000  # and some headers


def test_minutes_end_the_training_with_the_rate_brought_down(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: rates.append(self.param_groups[0]["lr"]) or step(self),
    )
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))  # a second for every look
    monkeypatch.setattr(training_clock, "time", clock)
    task = tiny_task(tmp_path, options={"recover_tokens": 10**6, "recover_minutes": 1.0})
    record = train(task)
    assert 60 <= record.seconds < 70 and 10 < len(rates) < 60
    assert rates[0] < max(rates) and rates[-1] < 0.1 * max(rates)


def test_checkpointed_layers_give_the_same_model(tmp_path, monkeypatch):
    results = []
    for on in (False, True):
        free = 1000 if on else 10**12
        monkeypatch.setattr(layer_checkpointing, "free_bytes", lambda _, free=free: free)
        task = tiny_task(tmp_path / str(on), options={"recover_tokens": 4 * LENGTH})
        calls = []
        layer = task.student.get_submodule("model.layers.1.mlp")
        handle = layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        record = train(task)
        handle.remove()
        assert record.settings["gradient_checkpointing"] == ("on" if on else "off")
        assert "forward" not in vars(task.student.get_submodule("model.layers.1"))
        results.append((len(calls), weights_of(task.student)))
    assert results[1][0] == results[0][0] + 4  # once more in every step
    for name, parameter in results[0][1].items():
        torch.testing.assert_close(parameter, results[1][1][name], rtol=0, atol=1e-6)


def test_terms_and_rank_are_read(tmp_path):
    options = {"recover_rank": 3, "recover_cross_entropy": 0.5, "recover_hidden": 0.1}
    task = tiny_task(tmp_path, options={**options, "recover_tokens": 2 * LENGTH})
    settings = train(task).settings
    assert (settings["rank"], settings["cross_entropy"], settings["hidden"]) == (3, 0.5, 0.1)


def test_float16_is_trained_in_float32(tmp_path):
    models = {"student": pruned(parent()).half(), "teacher": parent().half()}
    task = tiny_task(tmp_path, options={"recover_tokens": 20 * LENGTH}, **models)
    record = train(task)
    assert record.held_out_after < record.held_out_before
    assert {parameter.dtype for parameter in task.student.parameters()} == {torch.float16}


def test_the_curve_has_points_between_measurements(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "POINTS", 10)
    options = {"recover_tokens": 20 * LENGTH}
    record = train(tiny_task(tmp_path, held_out=tiny_text(4, seed=2), options=options))
    assert [point.tokens for point in record.curve] == [2 * LENGTH * n for n in range(1, 11)]
    assert sum(point.held_out is not None for point in record.curve) == 2


def test_seeds_differ(tmp_path):
    task = tiny_task(tmp_path / "a")
    other = replace(tiny_task(tmp_path / "b"), seed=6)
    assert train(task).curve != train(other).curve


def test_a_gpu_runs_fewer_sequences_before_it_checkpoints(monkeypatch):
    model = parent()
    needed = layer_checkpointing.activation_bytes(model, LENGTH) / layer_checkpointing.SHARE

    def fit(sequences: float) -> tuple[int, bool]:
        free = int(sequences * needed) + 1000
        monkeypatch.setattr(layer_checkpointing, "free_bytes", lambda _: free)
        found = layer_checkpointing.fit_batch(model, 8, LENGTH, reserved=1000)
        return found.rows, found.checkpoints

    assert (fit(8.1), fit(7.9)) == ((8, False), (8, True))  # a CPU
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    assert (fit(8.1), fit(7.9), fit(2.1), fit(0.9)) == (
        (8, False),
        (4, False),
        (2, False),
        (1, True),
    )
