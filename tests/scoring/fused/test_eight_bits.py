"""Weights in 8 bits: made once for all rows that are multiplied by them, and never out of date.

The truth is a product that quantises both sides anew every time, whole: whatever is kept for too
long, or cut in the wrong place, shows in the bits.
"""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from families import FAMILIES
from surgery_cases import tokens
from tiny import tiny_llama
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_layers
from bonsai_fast.models import AttentionBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.scoring.fused.arithmetic import eight_bits
from bonsai_fast.scoring.fused.arithmetic.eight_bits import Scaled, blocks
from bonsai_fast.scoring.fused.arithmetic.products import Product, int8
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.schedule import FusedWorkingSet, Schedule

ROUTES = ["dense", "slice", "pack", "tail", "split", "auto"]
CPU = torch.device("cpu")


def anew(a: torch.Tensor, pairs: list[Product], _: Workspace) -> None:
    """int8 products, written down as they are meant."""

    def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.float().abs().amax(dim=1, keepdim=True) / 127.0
        scale = torch.where(scale == 0, 1.0, scale)
        return (x.float() / scale).round().nan_to_num(0.0).clamp(-127.0, 127.0), scale

    for weight, out in pairs:
        (left, left_scale), (right, right_scale) = quantized(a), quantized(weight.matrix.t())
        sums = (left.double() @ right.double().t()).float()
        out.copy_(sums * left_scale * right_scale.t())


def round_masks(layout: Layout) -> torch.Tensor:
    """Some gone from all, most of the rest kept by all, few vary; two alike, two that part late."""
    generator = torch.Generator().manual_seed(2)
    draw = torch.rand(len(layout), generator=generator)
    keep = (draw > 0.3).repeat(6, 1)
    varies = draw > 0.7
    keep[:, varies] = torch.rand(6, int(varies.sum()), generator=generator) < 0.5
    keep[1] = keep[0]
    keep[2, : len(layout) // 2] = keep[0, : len(layout) // 2]
    return keep


def complements(layout: Layout) -> torch.Tensor:
    """The first MLP runs whole for two that part there, and in slices for a third."""
    keep = torch.ones(3, len(layout), dtype=torch.bool)
    heads, channels = layout.groups[:2]
    keep[0, heads.start] = False
    keep[0, channels.start : channels.stop - len(channels) // 2] = False
    keep[1, channels.start : channels.stop : 2] = False
    keep[2, channels.start + 1 : channels.stop : 2] = False
    return keep


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several waves, chunks of three rows, blocks of 7 tokens; copies as if they cost nothing."""
    schedule = Schedule(9, 3, slices=True, packs=True)
    monkeypatch.setattr(FusedWorkingSet, "schedule", lambda *_: schedule)
    monkeypatch.setitem(eight_bits.BLOCK_ROWS, "cpu", 7)
    for cost in ("COPY_TOKENS", "ALONE_TOKENS", "QUANTISE_TOKENS"):
        monkeypatch.setattr(f"bonsai_fast.scoring.fused.choose_route.{cost}", 0.0)


def scorer_of(model: PreTrainedModel, route: str, multiply=None) -> MaskScorer:
    scorer = MaskScorer(model, route=route, precision="int8")
    scorer.engine.kernels = route == "slice"  # their plain versions, once
    if multiply is not None:
        scorer.engine._multiply = multiply
    return scorer


@pytest.mark.usefixtures("small_parts", "poisoned_empty")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama3", torch.bfloat16), ("llama_bias", torch.float32), ("phi3", torch.float32)],
)
def test_same_bits_as_quantising_for_every_product(
    family: str, dtype: torch.dtype, route: str
) -> None:
    """Copies share memory with what was copied before them, and so do streamed layers."""
    model = FAMILIES[family]().to(dtype)
    expected_by = scorer_of(model, route, anew)
    masks = round_masks(expected_by.layout)
    expected = expected_by.score(masks, tokens(3))
    assert expected.std() > 0 and torch.isfinite(expected).all()
    assert torch.equal(scorer_of(model, route).score(masks, tokens(3)), expected)
    streamed = stream_layers(FAMILIES[family]().to(dtype), device="cpu")
    assert torch.equal(scorer_of(streamed, route).score(masks, tokens(3)), expected)


@pytest.mark.parametrize("route", ["dense", "slice"])
def test_weights_may_change_between_calls(route: str) -> None:
    """Also where PyTorch keeps no count of it."""
    scorer = scorer_of(FAMILIES["llama3"](), route)
    masks = round_masks(scorer.layout)
    before = scorer.score(masks, tokens())
    for name, parameter in scorer.model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data.mul_(torch.linspace(0.5, 1.5, len(parameter))[:, None])
    after = scorer.score(masks, tokens())
    assert not torch.equal(after, before)
    assert torch.equal(after, scorer_of(scorer.model, route).score(masks, tokens()))


class Copies:
    """Weights that were quantised, by address, and what their copies held at their most."""

    def __init__(self) -> None:
        self.times: Counter[int] = Counter()
        self.held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def note(self, x: torch.Tensor, copy: torch.Tensor) -> None:
        self.times[x.data_ptr()] += 1
        self.held.add(copy)
        self.most = max(self.most, sum(each.numel() for each in self.held))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    found, quantize = Copies(), eight_bits.quantize

    def noting(x: torch.Tensor, copy: torch.Tensor, workspace: Workspace) -> Scaled:
        found.note(x, copy)
        return quantize(x, copy, workspace)

    # `products` has its own name for it, by which it makes the left sides
    monkeypatch.setattr(eight_bits, "quantize", noting)
    return found


@pytest.mark.usefixtures("small_parts")
def test_a_weight_is_quantised_once_a_wave(copies: Copies) -> None:
    """However many chunks of rows and parting sub-models there are."""
    scorer = scorer_of(tiny_llama(), "dense")
    products = 0

    def counting(a: torch.Tensor, pairs: list[Product], workspace: Workspace) -> None:
        nonlocal products
        products += len(pairs)
        int8(a, pairs, workspace)

    scorer.engine._multiply = counting
    scorer.score(round_masks(scorer.layout), tokens(3))
    projections = {
        parameter.data_ptr()
        for name, parameter in scorer.model.named_parameters()
        if name.endswith("_proj.weight")
    }
    # of nine pairs, one sequence of five distinct sub-models
    assert copies.times == dict.fromkeys(projections, 3)
    assert products > 1.5 * copies.times.total()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("masks", [round_masks, complements])
@pytest.mark.parametrize("route", ROUTES)
def test_one_sublayer_at_a_time_is_held_in_8_bits(route: str, masks, copies: Copies) -> None:
    """As the working set has it: no copy outlives its sub-layer, or the slice it was made of."""
    scorer = scorer_of(tiny_llama(), route)
    scorer.score(masks(scorer.layout), tokens(3))
    assert copies.times.total() >= 7 * 4
    assert copies.most <= largest_sublayer(scorer.layout, 48)
    assert not copies.held


def largest_sublayer(layout: Layout, width: int) -> int:
    """Weights of the largest sub-layer's products."""
    sizes = []
    for group in layout.groups:
        block = group.block
        if isinstance(block, AttentionBlock):
            sizes.append(2 * width * (block.num_heads + block.num_kv_heads) * block.head_dim)
        else:
            sizes.append(3 * width * block.num_channels)
    return max(sizes)


def test_the_working_set_has_room_for_them() -> None:
    scorer = scorer_of(tiny_llama(), "dense")
    whole, low = (
        FusedWorkingSet.of(scorer.layout, scorer.engine.nll, 12, low=low) for low in (False, True)
    )
    assert low.fixed - whole.fixed >= largest_sublayer(scorer.layout, 48)
    assert scorer.engine._schedule(12).wave_rows < whole.schedule(scorer.memory_budget).wave_rows


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 14, 15, 100])
def test_blocks_cover_all_rows_in_even_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(eight_bits.BLOCK_ROWS, "cpu", 7)
    found = blocks(rows, CPU)
    assert [row for each in found for row in range(rows)[each]] == list(range(rows))
    sizes = [each.stop - each.start for each in found]
    assert len(sizes) == -(-rows // 7) and max(sizes, default=0) - min(sizes, default=0) <= 1
