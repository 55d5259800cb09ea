"""SPSA against autograd, the sensitivity score against its definition, weights that stay put."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from searches import new_search
from surgery_cases import tokens
from transformers import PreTrainedModel

from bonsai_fast.methods.units.mini_llm.mini_llm import gate_sensitivity, weight_sensitivity
from bonsai_fast.methods.units.mini_llm.spsa import (
    Directions,
    perturbed_weights,
    prunable_weights,
    scaled_gates,
)
from bonsai_fast.methods.units.taylor import weight_gradients
from bonsai_fast.methods.units.variables import Variables
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import SequenceNLL

SOME = ["llama3", "phi3", "opt", "bloom"]
CPU = torch.device("cpu")


def mean_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    return float(SequenceNLL(model)(input_ids).double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", SOME)
def test_weights_are_the_same_bits_afterwards(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]().to(dtype)
    layout = Layout.of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = model(input_ids=tokens(2)).logits
    directions = Directions(prunable_weights(layout), 0)
    with perturbed_weights(model, layout, directions, 0, 0.05):
        perturbed = model(input_ids=tokens(2)).logits
    assert not torch.allclose(perturbed, plain, atol=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name].view(torch.uint8), parameter.detach().view(torch.uint8))
    assert torch.equal(model(input_ids=tokens(2)).logits, plain)


def test_weights_come_back_when_a_layer_fails() -> None:
    model = FAMILIES["llama3"]()
    layout = Layout.of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    directions = Directions(prunable_weights(layout), 0)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.get_submodule(layout.decoder.mlp[1].output).register_forward_hook(fail)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        perturbed_weights(model, layout, directions, 0, 1.0),
    ):
        model(input_ids=tokens(2))
    handle.remove()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", SOME)
def test_a_layer_at_a_time_is_all_at_once(family: str) -> None:
    model, other = FAMILIES[family](), FAMILIES[family]()
    layout = Layout.of(model)
    directions = Directions(prunable_weights(layout), 7)
    with perturbed_weights(model, layout, directions, 3, 0.05):
        found = model(input_ids=tokens(2)).logits
    with torch.no_grad():
        for name in prunable_weights(layout):
            weight = other.get_parameter(name)
            weight.add_(0.05 * directions.draw(3, name, weight.shape, CPU))
    torch.testing.assert_close(found, other(input_ids=tokens(2)).logits, rtol=1e-5, atol=1e-5)


def test_directions_are_functions_of_their_numbers() -> None:
    directions = Directions(["a", "b"], 0)
    one = directions.draw(0, "a", (20000,), CPU)
    assert torch.equal(one, directions.draw(0, "a", (20000,), CPU))
    others = [
        directions.draw(1, "a", (20000,), CPU),
        directions.draw(0, "b", (20000,), CPU),
        Directions(["a", "b"], 1).draw(0, "a", (20000,), CPU),
    ]
    assert abs(float(one.mean())) < 0.03 and abs(float(one.var()) - 1) < 0.05
    assert all(abs(float((one * other).mean())) < 0.03 for other in others)


@pytest.mark.parametrize("family", SOME)
def test_two_losses_give_the_slope_of_autograd(family: str) -> None:
    """Each direction by itself, and the mean estimate within its standard error."""
    model, input_ids = FAMILIES[family](), tokens(4)
    layout = Layout.of(model)
    names, count, scale = prunable_weights(layout), 48, 3e-4
    directions = Directions(names, 0)
    with weight_gradients(model, layout, input_ids) as found:
        gradients = {name: gradient.double() for name, gradient in found.items()}
    square = sum(float(gradient.square().sum()) for gradient in gradients.values())
    along = []
    for number in range(count):
        losses = []
        for step in (scale, -scale):
            with perturbed_weights(model, layout, directions, number, step):
                losses.append(mean_loss(model, input_ids))
        slope = (losses[0] - losses[1]) / (2 * scale)
        exact = sum(
            float((gradient * directions.draw(number, name, gradient.shape, CPU)).sum())
            for name, gradient in gradients.items()
        )
        # a ReLU's kinks lie closer together than the step
        rough = 4 if family == "opt" else 1
        assert slope == pytest.approx(exact, rel=0.05 * rough, abs=0.02 * rough * square**0.5)
        along.append(slope * exact / square)  # the estimate's share of the true gradient
    ratio = torch.tensor(along)
    assert abs(float(ratio.mean()) - 1) <= 4 * float(ratio.std()) / count**0.5


def test_gates_scale_what_units_contribute(tmp_path: Path) -> None:
    model, input_ids = FAMILIES["llama3"](), tokens(3)
    layout = Layout.of(model, attention="kv-group", sublayers=True)
    plain = mean_loss(model, input_ids)
    with scaled_gates(model, layout, torch.ones(len(layout))):
        assert mean_loss(model, input_ids) == pytest.approx(plain, rel=1e-6)
    keep = torch.rand(len(layout), generator=torch.Generator().manual_seed(1)) < 0.8
    search = new_search(model, tmp_path / "run", attention="kv-group", sublayers=True)
    expected = search.task.scorer.score(keep[None], input_ids).mean()
    with scaled_gates(model, layout, keep.float()):
        assert mean_loss(model, input_ids) == pytest.approx(float(expected), rel=1e-5)


def test_gate_gradients_against_autograd(tmp_path: Path) -> None:
    model = FAMILIES["llama3"]()
    search = new_search(
        model, tmp_path / "run", method="mini-llm", perturbation="gates", directions=300,
        granularity="units", attention="kv-group",
    )  # fmt: skip
    layout, input_ids = search.task.layout, search.task.calibration.input_ids[:10]
    gates = torch.ones(len(layout), requires_grad=True)
    factors = {}
    for group in layout.groups:
        own = gates[group.start : group.stop][group.part_of_unit]
        width = model.get_submodule(group.block.output).in_features // len(own)
        factors[group.block.output] = own.repeat_interleave(width)
    handles = [
        model.get_submodule(output).register_forward_pre_hook(
            lambda _, inputs, factor=factor: (inputs[0] * factor, *inputs[1:])
        )
        for output, factor in factors.items()
    ]
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    for handle in handles:
        handle.remove()
    assert gates.grad is not None
    exact = gates.grad.double().abs()
    search.task.model.zero_grad()
    found = gate_sensitivity(search, torch.zeros(len(layout), dtype=torch.float64))
    # every coordinate's standard error is the gradient's norm / sqrt(300)
    error = float(exact.norm()) / 300**0.5
    assert float((found - exact).abs().max()) <= 4.5 * error + 0.02 * float(exact.max())
    assert float(torch.corrcoef(torch.stack([found, exact]))[0, 1]) > 0.6


@pytest.mark.parametrize("perturbation", ["weights", "weights-divided"])
def test_the_score_is_weight_times_gradient_times_activation(
    perturbation: str, tmp_path: Path
) -> None:
    model = FAMILIES["llama3"]()
    search = new_search(
        model, tmp_path / "run", method="mini-llm", perturbation=perturbation, directions=2,
        attention="kv-group", seed=3,
    )  # fmt: skip
    layout, input_ids = search.task.layout, search.task.calibration.input_ids
    found = weight_sensitivity(search)
    directions = Directions(prunable_weights(layout), 3)
    slopes = []
    for number in range(2):
        losses = []
        for step in (1e-3, -1e-3):
            with perturbed_weights(model, layout, directions, number, step):
                losses.append(float(SequenceNLL(model)(input_ids[:10]).double().mean()))
        slopes.append((losses[0] - losses[1]) / 2e-3)
    mlp = layout.decoder.mlp[1]
    path = mlp.output.removesuffix(".down_proj")
    seen: dict[str, torch.Tensor] = {}
    names = ("gate_proj", "up_proj", "down_proj")
    for name in names:
        model.get_submodule(f"{path}.{name}").register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].detach().flatten(0, 1)})
        )
    model(input_ids=input_ids)
    sums = []
    for name in names:
        weight = model.get_parameter(f"{path}.{name}.weight").detach()
        z = [directions.draw(i, f"{path}.{name}.weight", weight.shape, CPU) for i in range(2)]
        z = [1 / value for value in z] if perturbation == "weights-divided" else z
        gradient = (slopes[0] * z[0] + slopes[1] * z[1]) / 2
        score = (weight * gradient * seen[name].square().mean(dim=0).sqrt()).abs()
        sums.append(score.sum(dim=0 if name == "down_proj" else 1))
    expected = torch.stack(sums).amax(dim=0).double()
    group = next(g for g in layout.groups if g.block is mlp)
    torch.testing.assert_close(found[group.start : group.stop], expected, rtol=2e-3, atol=1e-9)


def test_blocks_hold_channels_of_neighbouring_prior() -> None:
    layout = Layout.of(FAMILIES["llama3"](), attention="kv-group")
    prior = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)).double()
    variables = Variables.of(layout, "blocks", prior)
    assert int(variables.of_unit.max()) + 1 == len(variables.costs) == len(variables.groups)
    assert variables.costs.sum() == float(layout.num_parameters_per_unit.sum())
    for group in layout.groups:
        own = variables.of_unit[group.start : group.stop]
        inside = prior[group.start : group.stop]
        assert (variables.groups[own.numpy()] == layout.groups.index(group)).all()
        tops = [
            (float(inside[own == v].min()), float(inside[own == v].max())) for v in own.unique()
        ]
        tops.sort()
        assert all(a[1] < b[0] for a, b in pairwise(tops))
        size = 1 if group.kind != "channel" else len(group) // 8
        assert int(torch.bincount(own)[own].max()) == size


@pytest.mark.parametrize("perturbation", ["weights", "weights-divided", "gates"])
def test_whole_runs_leave_the_parent_alone(perturbation: str, tmp_path: Path) -> None:
    model = FAMILIES["llama3"]().to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    search = new_search(
        model, tmp_path / "run", method="mini-llm", perturbation=perturbation, directions=2,
        sparsity=0.3, spare_first=1, spare_last=0, round_to="1",
    )  # fmt: skip
    keep = search.task.method.find(search)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    plan = search.task.method.plan(search.task)
    assert (plan.submodels, plan.tokens) == (search.submodels_scored, search.tokens_scored)
    first = torch.tensor([unit.layer == 0 for unit in search.task.layout])
    assert keep[first].all() and not keep.all()
