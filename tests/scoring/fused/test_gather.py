"""The gather route: rows of many masks in one batch, by kernels over what each of them keeps.

Here the ops run their plain versions, and on two models, by all routes, the kernels themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from scoring_cases import (
    FUSED,
    OpCalls,
    assert_hooks_and_pruned_agree,
    related_masks,
    wide_heads,
)
from surgery_cases import MASKS, tokens
from transformers import PreTrainedModel

import bonsai_fast
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.operands.gather import _joined, gathers
from bonsai_fast.scoring.fused.read_parent import read_structure
from bonsai_fast.scoring.fused.schedule import FusedWorkingSet, Schedule
from bonsai_fast.surgery import remove_units

HEAD_OPS = ("kept_head_proj", "grouped_attention", "kept_o_proj")
CHANNEL_OPS = ("kept_up_proj", "kept_down_proj")


def half_rotary() -> PreTrainedModel:
    """Half of each head is rotated, as in Phi-4-mini; its projections are fused."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return wide_heads("phi3", rope_parameters=rope)


# the width of phi_gqa's heads cannot be set
MODELS = {f: lambda family=f: wide_heads(family) for f in FUSED if f != "phi_gqa"}
MODELS["half_rotary"] = half_rotary


@pytest.fixture(scope="module")
def llama3() -> PreTrainedModel:
    return wide_heads("llama3")


def gathering(model: PreTrainedModel, layout: Layout | None = None) -> MaskScorer:
    return MaskScorer(model, layout=layout, engine="fused", route="gather")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("attention", ["head", "kv-group"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_hooks_and_the_pruned_model(name: str, attention: str) -> None:
    model, input_ids = MODELS[name](), tokens(3)
    layout = Layout.of(model, attention=attention, sublayers=True)
    masks = related_masks(layout)
    with OpCalls() as calls:
        scored = gathering(model, layout).score(masks, input_ids)
    # few KV groups are often all kept, and then nothing is gathered
    expected_ops = (*HEAD_OPS, *CHANNEL_OPS) if attention == "head" else CHANNEL_OPS
    assert all(calls.counts[op] for op in expected_ops)
    assert_hooks_and_pruned_agree(scored, model, layout, masks, input_ids)


def test_half_of_a_head_is_rotated() -> None:
    """Or the case above would prove nothing."""
    model = half_rotary()
    structure = read_structure(model, Layout.of(model))
    cos, _ = structure.rotary(torch.zeros(1, 4, 1), torch.arange(4)[None])
    assert cos.shape[-1] == 8


@pytest.mark.parametrize("mask", sorted(MASKS.keys() - {"everything gone"}))
@pytest.mark.parametrize("family", ["llama3", "llama_bias"])
def test_parents_that_were_pruned_before(family: str, mask: str) -> None:
    parent = wide_heads(family)
    layout = Layout.of(parent)
    model = remove_units(parent, layout, MASKS[mask](layout))
    masks = related_masks(Layout.of(model))
    hooks = MaskScorer(model, engine="hooks").score(masks, tokens())
    torch.testing.assert_close(gathering(model).score(masks, tokens()), hooks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["channel", "head"])
def test_a_poisoned_unit_spoils_only_those_that_keep_it(kind: str, poison: float) -> None:
    model, input_ids = wide_heads("llama3"), tokens()
    layout = Layout.of(model)
    masks = related_masks(layout)
    group = next(g for g in layout.groups if g.layer == 1 and g.kind == kind)
    unit = 3
    spoilt = masks[:, group.start + unit]
    assert spoilt.any() and not spoilt.all()
    clean = MaskScorer(model, layout=layout, engine="hooks").score(masks, input_ids)
    with torch.no_grad():
        layer = model.model.layers[1]
        weight = layer.mlp.up_proj.weight if kind == "channel" else layer.self_attn.q_proj.weight
        weight[unit * (1 if kind == "channel" else 16)] = poison
    scored = gathering(model, layout).score(masks, input_ids)
    # where all heads are kept PyTorch's attention runs, which may make 0 of NaN
    gathered = ~masks[:, group.start : group.stop].all(dim=1)
    assert not torch.isfinite(scored[spoilt & gathered]).any()
    torch.testing.assert_close(scored[~spoilt], clean[~spoilt], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("wave", "chunk"), [(1, 1), (4, 3), (7, 2), (48, 5), (1000, 1000)])
def test_waves_and_chunks_do_not_change_the_answer(
    llama3: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, wave: int, chunk: int
) -> None:
    """Chunks end inside a mask's rows, too."""
    input_ids = tokens(5)
    scorer = gathering(llama3)
    masks = related_masks(scorer.layout)
    expected = MaskScorer(llama3, engine="hooks").score(masks, input_ids)
    monkeypatch.setattr(FusedWorkingSet, "schedule", lambda *_: Schedule(wave, chunk, slices=True))
    torch.testing.assert_close(scorer.score(masks, input_ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_as_hooks_do(dtype: torch.dtype) -> None:
    model = wide_heads("qwen3")
    masks = related_masks(Layout.of(model))
    exact = MaskScorer(model, engine="hooks").score(masks, tokens())
    model = model.to(dtype)
    hooks = MaskScorer(model, engine="hooks").score(masks, tokens())
    budget = 2 * float((hooks - exact).abs().max()) + 1e-3
    assert float((gathering(model).score(masks, tokens()) - exact).abs().max()) <= budget


def test_what_the_kernels_do_not_take_runs_densely() -> None:
    """Heads of 10 columns; channels are still gathered."""
    model = FAMILIES["llama3"]()
    masks = related_masks(Layout.of(model))
    with OpCalls() as calls:
        scored = gathering(model).score(masks, tokens())
    assert not any(calls.counts[op] for op in HEAD_OPS)
    assert all(calls.counts[op] for op in CHANNEL_OPS)
    hooks = MaskScorer(model, engine="hooks").score(masks, tokens())
    torch.testing.assert_close(scored, hooks, rtol=0, atol=1e-4)


def test_one_batch_for_all_masks(llama3: PreTrainedModel) -> None:
    """Sub-models that part in the first sub-layer share every launch behind it."""
    layout = Layout.of(llama3)
    masks = torch.rand(6, len(layout), generator=torch.Generator().manual_seed(3)) < 0.7
    first = layout.groups[0]
    masks[:, first.start : first.stop] = ~torch.eye(6, dtype=torch.bool)
    with OpCalls() as calls:
        gathering(llama3, layout).score(masks, tokens())
    # all of the first sub-layer's heads are kept by somebody: it runs densely, once
    assert calls.counts["kept_o_proj"] == calls.counts["grouped_attention"] == 2
    assert calls.counts["kept_up_proj"] == calls.counts["kept_down_proj"] == 3


def test_masks_that_return_after_others(llama3: PreTrainedModel) -> None:
    """Rows of one mask lie apart: those between them are not theirs."""
    layout = Layout.of(llama3)
    masks = torch.ones(4, len(layout), dtype=torch.bool)
    first, last = layout.groups[0], layout.groups[-2]
    masks[:, first.start : first.stop] = torch.eye(6, dtype=torch.bool)[:4]
    for number in range(4):
        masks[number, last.start + number % 2] = False
    hooks = MaskScorer(llama3, engine="hooks").score(masks, tokens())
    torch.testing.assert_close(gathering(llama3).score(masks, tokens()), hooks, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi3", "llama_bias"])
def test_fused_gate_and_up_are_read_where_they_lie(family: str) -> None:
    model = wide_heads(family)
    layout = Layout.of(model)
    mlp = read_structure(model, layout).sublayers[1]
    assert gathers(mlp)
    joined = _joined(mlp.gate, mlp.up, Arithmetic(mlp.gate.weight))
    assert torch.equal(joined.weight, torch.cat([mlp.gate.weight, mlp.up.weight]))
    is_view = joined.weight.data_ptr() == mlp.gate.weight.data_ptr()
    assert is_view == (family == "phi3")
    assert (joined.bias is None) == (mlp.gate.bias is None)


@pytest.mark.kernel
def test_the_kernels_give_the_same_by_every_route() -> None:
    """In a process of its own: only there do ops on CPU tensors call what a GPU would run."""
    pytest.importorskip("triton")
    tests = Path(__file__).parents[2]
    places = (Path(bonsai_fast.__file__).parents[1], tests, tests / "ops")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert len(found["differences"]) == 9 and max(found["differences"].values()) < 1e-4
    used = {*HEAD_OPS, *CHANNEL_OPS, "glu_mask", "lm_head_nll", "compact_rows", "compact_columns"}
    assert used <= found["calls"].keys()
