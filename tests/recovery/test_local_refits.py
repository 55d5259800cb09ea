"""Sub-models scored as compensated, and the surgeon's order, against brute force."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCABULARY

from bonsai_fast.checkpoints.streaming import stream_layers
from bonsai_fast.models import find_decoder
from bonsai_fast.models.layout import Layout
from bonsai_fast.recovery.closed_form.local_refits import LocalRefits
from bonsai_fast.recovery.closed_form.output_grams import OutputGrams
from bonsai_fast.recovery.closed_form.surgeon_order import surgeon_order
from bonsai_fast.scoring import MaskScorer, SequenceNLL
from bonsai_fast.surgery import remove_units

IDS = torch.randint(VOCABULARY, (7, 12), generator=torch.Generator().manual_seed(0))


def problem(inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(200, inputs, generator=generator) @ torch.randn(
        inputs, inputs, generator=generator
    )
    return mixed.T @ mixed / 200, torch.randn(outputs, inputs, generator=generator)


def least_cost(
    gram: torch.Tensor, weight: torch.Tensor, gone: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Squared error, ridge included, when the other columns make up best for those that go."""
    damped = gram.double()
    damped = damped + ridge * damped.diagonal().mean() * torch.eye(len(gram))
    left = (~gone).nonzero().flatten()
    rest = weight.double()[:, gone]
    update = rest @ damped[gone][:, left] @ damped[left][:, left].inverse()
    change = -weight.double().clone()
    change[:, left] = update
    return (change @ damped * change).sum()


@pytest.mark.parametrize("ridge", [0.01, 0.5])
def test_order_against_brute_force(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel at a time: every choice is the cheapest next one, at its exact cost."""
    monkeypatch.setattr("bonsai_fast.recovery.closed_form.surgeon_order.FEWEST", 1)
    gram, weight = problem(8, 5, 1)
    order, costs = surgeon_order(gram, weight, 1, torch.arange(8), ridge=ridge)
    gone, before = torch.zeros(8, dtype=torch.bool), torch.tensor(0.0)
    for unit in order.tolist():
        each = {}
        for other in (~gone).nonzero().flatten().tolist():
            trial = gone.clone()
            trial[other] = True
            each[other] = least_cost(gram, weight, trial, ridge)
        assert min(each, key=lambda other: float(each[other])) == unit
        assert float(costs[unit]) == pytest.approx(float(each[unit] - before), rel=1e-3)
        before = each[unit]
        gone[unit] = True
    assert sorted(order.tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("width", "units"), [(4, [0, 0, 1, 1, 2, 2]), (3, [0, 1, 2, 3]), (1, list(range(40)))]
)
def test_costs_of_blocks(width: int, units: list[int]) -> None:
    """Heads of several columns, groups of heads, and channels 16 at a time."""
    columns = width * len(units)
    gram, weight = problem(columns, 6, 2)
    owner = torch.tensor(units)
    order, costs = surgeon_order(gram, weight, width, owner, ridge=0.1)
    step = 16 if width == 1 else 1
    for count in range(step, len(costs), step):
        gone = torch.isin(owner, order[:count]).repeat_interleave(width)
        total = float(costs[order[:count]].sum())
        assert total == pytest.approx(float(least_cost(gram, weight, gone, 0.1)), rel=1e-3)
    assert bool((costs > 0).all())


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_grams_and_refits(family: str, tmp_path: Path) -> None:
    """Against all inputs side by side; streamed, and a second call that has nothing to do."""
    model = FAMILIES[family]()
    grams = OutputGrams(tmp_path / "grams")
    grams.collect(model, IDS)
    block = find_decoder(model).mlp[1]
    seen: list[torch.Tensor] = []
    path = f"{find_decoder(model).path}.1"
    hooks = [
        model.get_submodule(block.output).register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        ),
        model.get_submodule(path).register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    inputs, residual = seen[0].double(), seen[1].double().flatten(0, 1)
    weights = 1 / residual.square().mean(dim=1)
    linear = model.get_submodule(block.output)
    mean = torch.zeros(inputs.shape[1]).double()
    if linear.bias is not None:
        mean = weights @ inputs / weights.sum()
    gram = (inputs - mean).T @ ((inputs - mean) * weights[:, None]) / len(inputs)
    found = grams.of(block)
    torch.testing.assert_close(found.gram.double(), gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-4, atol=1e-5)
    keep = torch.rand(block.num_channels, generator=torch.Generator().manual_seed(1)) > 0.3
    refit = LocalRefits(model, grams, ridge=0.2, cache_bytes=0)(block, keep)
    own = linear.weight.detach().double()
    damped = gram[keep][:, keep] + 0.2 * gram.diagonal().mean() * torch.eye(int(keep.sum()))
    change = own[:, ~keep] @ gram[~keep][:, keep] @ damped.inverse()
    torch.testing.assert_close(refit.weight.double(), own[:, keep] + change, rtol=1e-3, atol=1e-4)
    if linear.bias is not None:
        assert refit.bias is not None
        lost = own[:, ~keep] @ mean[~keep] - change @ mean[keep]
        torch.testing.assert_close(
            refit.bias.double(), linear.bias.detach() + lost, rtol=1e-3, atol=1e-4
        )
    stamp = {file: file.stat().st_mtime_ns for file in (tmp_path / "grams").iterdir()}
    grams.collect(model, IDS)
    assert stamp == {file: file.stat().st_mtime_ns for file in (tmp_path / "grams").iterdir()}
    streamed = OutputGrams(tmp_path / "streamed")
    streamed.collect(stream_layers(model, device="cpu"), IDS)
    assert torch.equal(streamed.of(block).gram, found.gram)


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"statistics need .* GiB"):
        OutputGrams(tmp_path / "grams").collect(FAMILIES["llama"](), IDS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["head", "kv-group"])
def test_scores_are_those_of_the_compensated_model(
    family: str, attention: str, tmp_path: Path
) -> None:
    """Scored with own projections, and cut from the parent with these projections in place."""
    model = FAMILIES[family]()
    layout = Layout.of(model, attention=attention)  # type: ignore[arg-type]
    grams = OutputGrams(tmp_path / "grams")
    grams.collect(model, IDS)
    refits = LocalRefits(model, grams, ridge=0.3, cache_bytes=1 << 20)
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(3, len(layout), generator=generator) > 0.3
    scores = MaskScorer(model, layout=layout).score(keep, IDS, output_weights=refits)
    for mask, found in zip(keep, scores, strict=True):
        smaller = remove_units(model, layout, mask)
        for block, parts in layout.keep_by_block(mask):
            if bool(parts.all()):
                continue
            projection = refits(block, parts)
            output = smaller.get_submodule(block.output)
            with torch.no_grad():
                if bool(parts.any()):
                    output.weight.copy_(projection.weight)
                if projection.bias is not None:
                    output.bias.copy_(projection.bias)
        torch.testing.assert_close(SequenceNLL(smaller)(IDS), found, rtol=1e-4, atol=1e-4)
