"""What experts are worth: statistics of routed tokens and REAP's saliency, against slow truths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES
from searches import new_search
from surgery_cases import logits_of, tokens
from transformers import PreTrainedModel

from bonsai_fast.methods.importance.prior import unit_prior
from bonsai_fast.methods.importance.statistics import collect_statistics, unreached_experts
from bonsai_fast.models import ExpertsBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer


def experts_called(
    model: PreTrainedModel, block: ExpertsBlock, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the experts of a mixture are given: states [N, D], chosen [N, k], weights [N, k]."""
    seen: list[tuple[torch.Tensor, ...]] = []
    module = model.get_submodule(block.experts)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    logits_of(model, input_ids)
    handle.remove()
    states, chosen, weights = seen[0]
    return states, chosen, weights


def gated(model: PreTrainedModel, block: ExpertsBlock, state: torch.Tensor, expert: int):
    """One token through one expert, by hand: (input of the output projection, output)."""
    module = model.get_submodule(block.experts)
    if block.transposed:  # gpt-oss
        both = state @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
        inner = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
        return inner, inner @ module.down_proj[expert] + module.down_proj_bias[expert]
    both = module.gate_up_proj[expert] @ state
    gate, up = both[: block.num_channels], both[block.num_channels :]
    inner = module.act_fn(gate) * up
    return inner, module.down_proj[expert] @ inner


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
def test_statistics_of_routed_tokens(family: str) -> None:
    model, input_ids = MIXTURES[family](), tokens(2)
    scorer = MaskScorer(model)
    layout = scorer.layout
    everything = torch.ones(len(layout), dtype=torch.bool)
    statistics = collect_statistics(scorer, everything, input_ids)
    torch.testing.assert_close(statistics.losses, scorer.score(everything[None], input_ids)[0])
    priors = {name: unit_prior(name, model, layout, statistics) for name in ("reap", "wanda")}
    for group in (g for g in layout.groups if g.kind == "expert"):
        block = group.block
        assert isinstance(block, ExpertsBlock)
        states, chosen, weights = experts_called(model, block, input_ids)
        norms: list[list[float]] = [[] for _ in range(block.num_experts)]
        read = torch.zeros(len(states), block.num_experts, block.num_channels)
        for token, places in enumerate(chosen.tolist()):
            for place, expert in enumerate(places):
                inner, output = gated(model, block, states[token], expert)
                share = float(weights[token, place])
                norms[expert].append(share * float(output.norm()))
                read[token, expert] = share * inner
        counts = statistics.experts[block.output]
        assert counts.routed.tolist() == [len(own) for own in norms]
        wanted = torch.tensor([sum(own) / max(1, len(own)) for own in norms]).double()
        inside = slice(group.start, group.stop)
        torch.testing.assert_close(priors["reap"][inside], wanted, rtol=1e-4, atol=1e-6)
        found = statistics.of(block)
        assert found.num_tokens == len(states)
        flat = read.flatten(1).double()
        torch.testing.assert_close(found.mean, flat.mean(dim=0), rtol=1e-4, atol=1e-6)
        rms = flat.square().mean(dim=0).sqrt()
        torch.testing.assert_close(found.root_mean_square, rms, rtol=1e-4, atol=1e-6)
        down = model.get_parameter(block.output).double()
        size = (down if block.transposed else down.transpose(1, 2)).abs().mean(dim=2)
        by_hand = (size * rms.view(size.shape)).mean(dim=1)
        torch.testing.assert_close(priors["wanda"][inside], by_hand, rtol=1e-4, atol=1e-8)
    others = torch.tensor([unit.kind != "expert" for unit in layout])
    assert torch.equal(priors["reap"][others], priors["wanda"][others])


def test_experts_that_no_token_reached_are_named() -> None:
    """A bias keeps one expert from being chosen; a removed one is not missed."""
    model = MIXTURES["gpt_oss"]()
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -1e4
    scorer = MaskScorer(model)
    layout = scorer.layout
    keep = torch.ones(len(layout), dtype=torch.bool)
    keep[next(g for g in layout.groups if g.kind == "expert" and g.layer == 1).start] = False
    statistics = collect_statistics(scorer, keep, tokens(6))
    assert statistics.experts[layout.decoder.experts[1].output].unreached == [0, 3]
    assert unreached_experts(layout, keep, statistics) == [
        "layer 1: no calibration token reached 1 of 4 experts (3); "
        "more text may tell what they are worth"
    ]


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "qwen2_moe"])
def test_reap_removes_the_same_share_of_experts_everywhere(family: str, tmp_path: Path) -> None:
    model = MIXTURES[family]()
    layout = Layout.of(model)
    groups = [g for g in layout.groups if g.kind == "expert"]
    sparsity = sum(2 * g.num_parameters for g in groups) / layout.num_decoder_parameters
    search = new_search(model, tmp_path, method="reap", sparsity=sparsity + 1e-6)
    keep = search.task.method.find(search)
    saliency = search.prior(
        "reap", "parent", torch.ones_like(keep), search.task.calibration.input_ids
    )
    kinds = [unit.kind for unit in search.task.layout]
    assert all(kept or kind == "expert" for kept, kind in zip(keep.tolist(), kinds, strict=True))
    for group in (g for g in search.task.layout.groups if g.kind == "expert"):
        inside = slice(group.start, group.stop)
        lowest = saliency[inside].argsort()[:2]
        assert sorted(lowest.tolist()) == (~keep[inside]).nonzero().flatten().tolist()


def test_reap_says_at_once_what_it_cannot_do(tmp_path: Path) -> None:
    search = new_search(MIXTURES["mixtral"](), tmp_path / "a", method="reap", sparsity=0.9)
    with pytest.raises(ValueError, match="removes experts alone: at most"):
        search.task.method.plan(search.task)
