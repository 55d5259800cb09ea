"""Tier "compensate": against recomputing everything, for every family, streamed and resumed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY
from tiny import tiny_llama
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import open_streamed
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.models import find_decoder
from bonsai_fast.models.layout import Layout
from bonsai_fast.recovery import RecoveryTask, TierRecord
from bonsai_fast.recovery.closed_form import Compensate, compensate, sequential
from bonsai_fast.recovery.closed_form.residual_factor import residual_factor
from bonsai_fast.recovery.closed_form.sequential import SequentialRefit
from bonsai_fast.runs.layer_record import LayerRecord
from bonsai_fast.surgery import remove_units, save_pretrained

TIER = Compensate()
QUIET = Reporter(quiet=True)
# their sub-layers' outputs are normalised before they reach the residual stream
NORMALISED = {("opt_post", "attention"), ("opt_post", "mlp"), ("bloom_post", "attention")}


def text_of(sequences: int, seed: int) -> Sequences:
    ids = torch.randint(VOCABULARY, (sequences, 16), generator=torch.Generator().manual_seed(seed))
    return Sequences(ids, "random", "random")


def task_of(
    teacher: PreTrainedModel, student: PreTrainedModel, folder: Path, **changes: Any
) -> RecoveryTask:
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "teacher": teacher,
        "student": student,
        "tokenizer": None,
        "text": text_of(12, 1),
        "held_out": text_of(6, 2),
        "options": RecoverOptions(),
        "seed": 0,
        "folder": folder,
        "reporter": QUIET,
    }
    return RecoveryTask(**{**values, **changes})


def some_keep(layout: Layout, *, whole: bool = False) -> torch.Tensor:
    """Removes something of most sub-layers; of the second layer the whole MLP, if asked."""
    generator = torch.Generator().manual_seed(3)
    keep = torch.ones(len(layout), dtype=torch.bool)
    for group in layout.groups:
        if group.layer == 2 and group.kind != "channel":
            continue
        count = max(1, len(group) // 4)
        if whole and group.layer == 1 and group.kind == "channel":
            count = len(group)
        keep[group.start + torch.randperm(len(group), generator=generator)[:count]] = False
    return keep


def pair_of(family: str, **how: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = FAMILIES[family]()
    layout = Layout.of(teacher, attention="kv-group")
    return teacher, remove_units(teacher, layout, some_keep(layout, **how))


def seen_by(
    model: PreTrainedModel, layer: int, kind: str, ids: torch.Tensor, *, without_mlp: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input and output of a projection, and the layer's output, from a pass of the whole model."""
    decoder = find_decoder(model)
    block = getattr(decoder, kind)[layer]
    hooks, found = [], {}
    projection = model.get_submodule(block.output)
    hooks.append(
        projection.register_forward_hook(
            lambda _, inputs, output: found.update(x=inputs[0], y=output)
        )
    )
    if without_mlp:
        mlp = model.get_submodule(decoder.mlp[layer].output)
        hooks.append(mlp.register_forward_hook(lambda _, __, output: 0 * output))
    module = model.get_submodule(f"{decoder.path}.{layer}")
    hooks.append(
        module.register_forward_hook(
            lambda _, __, out: found.update(h=out[0] if isinstance(out, tuple) else out)
        )
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    width = found["h"].shape[-1]
    return (
        found["x"].reshape(-1, found["x"].shape[-1]).double(),
        found["y"].reshape(-1, width).double(),
        found["h"].reshape(-1, width).double(),
    )


def recomputed(
    family: str,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    task: RecoveryTask,
    ridge: float,
) -> None:
    """Refit the student, every projection from whole passes and a naive solution."""
    dense, pruned = find_decoder(teacher), find_decoder(student)
    ids = task.text.input_ids
    for layer in range(pruned.num_layers):
        for kind in ("attention", "mlp"):
            block = getattr(pruned, kind).get(layer)
            if block is None:
                continue
            projection = student.get_submodule(block.output)
            parent = teacher.get_submodule(getattr(dense, kind)[layer].output)
            if projection.in_features == parent.in_features:
                continue
            alone = kind == "attention" and layer in pruned.mlp
            _, y_dense, h_dense = seen_by(teacher, layer, kind, ids, without_mlp=alone)
            x, y, h = seen_by(student, layer, kind, ids, without_mlp=alone)
            lacks = y_dense - y if (family, kind) in NORMALISED else h_dense - h
            share = 1 / h_dense.square().mean(dim=1)
            share = share / share.sum()
            has_bias = projection.bias is not None
            mean_x = share @ x if has_bias else torch.zeros(x.shape[1], dtype=torch.float64)
            mean_r = share @ lacks if has_bias else torch.zeros(lacks.shape[1]).double()
            rows = (x - mean_x) * share.sqrt()[:, None]
            gram = rows.T @ rows
            gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
            change = (gram.inverse() @ rows.T @ ((lacks - mean_r) * share.sqrt()[:, None])).T
            with torch.no_grad():
                projection.weight += change
                if has_bias:
                    projection.bias += mean_r - change @ mean_x


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One ridge, and every refit is used, also where random text gives no reason to."""
    monkeypatch.setattr(sequential, "RIDGES", (0.5,))
    monkeypatch.setattr(
        sequential, "best_correction", lambda found, _, ridges: found.solve(*ridges)
    )
    monkeypatch.setattr(compensate, "_held_out_losses", lambda task: torch.tensor([torch.inf]))


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("whole", [False, True], ids=["parts", "an-mlp-removed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_like_recomputing_everything(family: str, whole: bool, tmp_path: Path) -> None:
    teacher, student = pair_of(family, whole=whole)
    cut, expected = copy.deepcopy(student), copy.deepcopy(student)
    before = copy.deepcopy(teacher)
    task = task_of(teacher, student, tmp_path / "task")
    recomputed(family, teacher, expected, task, 0.5)
    record = TIER.run(task)
    outputs = {block.output for block in find_decoder(student).blocks()}
    refitted = 0
    for (name, found), (_, wanted), (_, old) in zip(
        *(model.named_parameters() for model in (student, expected, cut)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-4, msg=f"{name}: {{}}".format)
        same = torch.equal(found, old)
        assert same or name.rpartition(".")[0] in outputs
        refitted += not same and name.endswith("weight")
    # with one KV head, its removal leaves no attention to refit
    attention = 2 if find_decoder(teacher).attention[0].num_kv_heads > 1 else 0
    assert refitted == record.settings["refitted"] == attention + (2 if whole else 3)
    assert_equal(teacher, before)


def assert_equal(one: PreTrainedModel, other: PreTrainedModel) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def restorable() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Every channel exists twice, and one of each pair is removed: nothing need be lost."""
    teacher = FAMILIES["llama"]()
    layout = Layout.of(teacher)
    keep = torch.ones(len(layout), dtype=torch.bool)
    with torch.no_grad():
        for layer in teacher.model.layers:
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                weight[20:] = weight[:20]
    for group in layout.groups:
        if group.kind == "channel":
            keep[group.start + 20 : group.stop] = False
    return teacher, remove_units(teacher, layout, keep)


def test_what_is_left_twice_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # random text is not predicted better by a better model
    monkeypatch.setattr(compensate, "_held_out_losses", lambda task: torch.tensor([torch.inf]))
    teacher, student = restorable()
    ids = text_of(4, 9).input_ids
    with torch.no_grad():
        dense, cut = teacher(ids).logits, student(ids).logits
        record = TIER.run(task_of(teacher, student, tmp_path / "task", text=text_of(40, 1)))
        healed = student(ids).logits
    assert (healed - dense).square().mean() < 0.02 * (cut - dense).square().mean()
    assert record.settings["refitted"] == record.settings["projections"] == 3
    assert record.notes == []
    assert record.tokens == 640 and record.peak_bytes is not None


def test_what_does_not_help_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projection that no ridge helps, and then a whole model that got worse."""
    teacher, student = pair_of("llama")
    before = copy.deepcopy(student)
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "best_correction", lambda *_: None)
        record = TIER.run(task_of(teacher, student, tmp_path / "none"))
    assert_equal(student, before)
    assert len(record.notes) == 5 and "keeps its weights" in record.notes[0]
    monkeypatch.setattr(compensate, "_held_out_losses", lambda task: torch.tensor([0.0]))
    record = TIER.run(task_of(teacher, student, tmp_path / "worse"))
    assert_equal(student, before)
    assert "all weights were kept" in record.notes[-1]
    assert record.held_out_after == record.held_out_before == 0.0


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_streamed_like_in_memory(family: str, tmp_path: Path) -> None:
    teacher, student = pair_of(family)
    for name, model in (("teacher", teacher), ("student", student)):
        save_pretrained(model, tmp_path / name)
    streamed = [open_streamed(tmp_path / name, device="cpu") for name in ("teacher", "student")]
    found = TIER.run(task_of(*streamed, tmp_path / "streamed"))
    assert found.settings == TIER.run(task_of(teacher, student, tmp_path / "whole")).settings
    weights = dict(student.named_parameters())
    record = LayerRecord(tmp_path / "streamed" / "layers")
    layers = [record[number] for number in range(3)]
    assert sum(len(layer) for layer in layers) >= 5
    for layer in layers:
        for name, new in layer.items():
            assert torch.equal(new, weights[name]), name


@pytest.mark.usefixtures("unguarded")
def test_an_interrupted_start_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = pair_of("mistral")
    again = copy.deepcopy(student)
    whole = TIER.run(task_of(teacher, student, tmp_path / "whole"))
    saved, calls = LayerRecord.save, []

    def save_twice(self: LayerRecord, *arguments: Any) -> None:
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        saved(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LayerRecord, "save", save_twice)
        with pytest.raises(KeyboardInterrupt):
            TIER.run(task_of(teacher, again, tmp_path / "killed"))
    with monkeypatch.context() as patch:
        refitted = []
        refit = SequentialRefit._refit
        patch.setattr(
            SequentialRefit,
            "_refit",
            lambda self, number, *rest: (refitted.append(number), refit(self, number, *rest))[1],
        )
        found = TIER.run(task_of(teacher, again, tmp_path / "killed"))
    assert set(refitted) == {1, 2}
    assert_equal(student, again)
    assert replace(found, seconds=0, peak_bytes=0) == replace(whole, seconds=0, peak_bytes=0)


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [("llama", 1.0, 1.0), ("phi", 1.0, 1.0), ("bloom_post", None, 1.0), ("opt_post", None, None)],
)
def test_factors(family: str, attention: float | None, mlp: float | None) -> None:
    model = FAMILIES[family]()
    decoder = find_decoder(model)
    ids = text_of(2, 5).input_ids

    def run() -> torch.Tensor:
        found: list[Any] = []
        layer = model.get_submodule(f"{decoder.path}.1")
        hook = layer.register_forward_hook(lambda _, __, output: found.append(output))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        hook.remove()
        return found[0][0] if isinstance(found[0], tuple) else found[0]

    outputs = [
        model.get_submodule(block.output) for block in (decoder.attention[1], decoder.mlp[1])
    ]
    for output, other, expected in zip(outputs, outputs[::-1], (attention, mlp), strict=True):
        found = residual_factor(run, output, other)
        assert found == (expected if expected is None else pytest.approx(expected, rel=1e-4))


def test_granite_multiplies_what_is_added() -> None:
    """A factor that is not 1, by a hook that halves what a layer adds."""
    layer = torch.nn.Linear(8, 8)
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert residual_factor(lambda: states + 0.22 * layer(states), layer, None) == pytest.approx(
            0.22, rel=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "deeper"}, "as many layers as the pruned model, 3, got 4"),
        ({"teacher": "wider"}, "hidden size 48, got 96"),
        ({"memory_budget": 1000}, "memory budget"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    others = {
        "deeper": {"num_hidden_layers": 4},
        "wider": {"hidden_size": 96, "num_hidden_layers": 3},
    }
    if isinstance(changes.get("teacher"), str):
        changes = {"teacher": tiny_llama(**others[changes["teacher"]])}
        student = tiny_llama(num_hidden_layers=3)
    else:
        changes, student = {**changes, "teacher": tiny_llama()}, tiny_llama()
    task = task_of(changes.pop("teacher"), student, tmp_path / "task", **changes)
    with pytest.raises(ValueError, match=message):
        TIER.check(task)


def test_nothing_cut_nothing_done(tmp_path: Path) -> None:
    teacher = FAMILIES["llama"]()
    student = copy.deepcopy(teacher)
    record: TierRecord = TIER.run(task_of(teacher, student, tmp_path / "task"))
    assert record.settings["projections"] == 0
    assert_equal(student, teacher)
