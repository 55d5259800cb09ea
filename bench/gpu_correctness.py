"""Sections of gpu.py about correctness: each op against its reference, each route against hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gpu_kernels import GLU
from gpu_models import random_model, round_masks
from gpu_report import Report
from gpu_scoring import ROUND_ROUTES, ROUTES
from torch import Tensor
from transformers import PreTrainedModel

from bonsai_fast import ops
from bonsai_fast.models import Block
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring import MaskScorer, OutputProjection
from bonsai_fast.testing import reference
from bonsai_fast.testing.cases import (
    ModelShape,
    assert_within_baseline,
    random_tensor,
    random_wave,
)

# Largest error of an engine in nats: in float32, and as a multiple of the hooks' error in bfloat16.
FLOAT32_TOLERANCE, BFLOAT16_FACTOR = 1e-3, 2.0


def kernels(report: Report, device: torch.device) -> None:
    """Each op against its naive reference, on odd sizes, in each dtype."""
    report.begin("kernels", "kernels against references in float64")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, check in _checks(device, dtype).items():
            report.need(5, f"{name} in {dtype}")
            with report.case("kernels"):
                check()
                report.add("kernels", f"{name:18} {dtype!s:15} right", op=name, dtype=str(dtype))


def _checks(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Each op on ragged groups; sub-models keep 70 %, nothing, all and one unit."""
    options = {"dtype": dtype, "device": device}
    sizes = [130, 3, 200, 2]
    wave = random_wave(sizes, 330, multiple=128, device=device)
    heads = random_wave(sizes, 6, device=device)
    rows, group = sum(sizes), wave.rows.row_group
    x = random_tensor(rows, 192, **options)
    bank = random_tensor(660, 192, scale=192**-0.5, seed=1, **options)
    columns = random_tensor(330, 192, scale=330**-0.5, seed=2, **options)
    head_bank = random_tensor(6 * 64, 192, scale=192**-0.5, seed=3, **options)
    output = random_tensor(192, 6 * 64, scale=384**-0.5, seed=4, **options)
    vocabulary = random_tensor(1003, 192, scale=4 * 192**-0.5, seed=5, **options)
    labels = torch.arange(rows, device=device) * 7 % 1003
    angles = random_tensor(256, 16, seed=6, device=device)
    places = torch.arange(rows, device=device) % 256
    slots = heads.kept.width
    gate_up = x @ bank.T
    up = partial(
        reference.kept_up_proj_reference,
        keep=wave.keep, row_group=group, width=wave.kept.width, **GLU,
    )  # fmt: skip
    channels = up(x, bank)
    q, k = (random_tensor(rows, slots, 64, seed=seed, **options) for seed in (7, 8))
    v = random_tensor(rows, slots, 64, seed=9, **options)
    q_to_kv = torch.arange(slots, dtype=torch.int32, device=device).expand(4, -1).contiguous()
    sequences = ops.SequencePlan.of(sizes, range(4), device=device).tiles
    attend = (heads.kept.count, q_to_kv)
    kept_rows = torch.tensor([1, 4, 5, 300], dtype=torch.int32, device=device)

    def within(actual: Tensor, truth: Callable[..., Tensor], *inputs: Tensor) -> None:
        assert_within_baseline(actual, truth, *inputs)

    def copies() -> None:
        out = bank.new_empty(64, 192)
        ops.compact_rows(bank, kept_rows, out)
        assert torch.equal(out, reference.compact_rows_reference(bank, kept_rows, 64))
        out = bank.new_empty(192, 64)
        source = columns.T.contiguous()
        ops.compact_columns(source, kept_rows, out)
        assert torch.equal(out, reference.compact_columns_reference(source, kept_rows, 64))

    def moments() -> None:
        for found, truth in zip(
            ops.column_moments(x), reference.column_moments_reference(x), strict=True
        ):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)

    return {
        "glu_mask": lambda: within(
            ops.glu_mask(gate_up, wave.keep, group, **GLU),
            partial(reference.glu_mask_reference, keep=wave.keep, row_group=group, **GLU),
            gate_up,
        ),
        "kept_up_proj": lambda: within(ops.kept_up_proj(x, bank, *wave.tables, **GLU), up, x, bank),
        "kept_down_proj": lambda: within(
            ops.kept_down_proj(channels, columns, *wave.tables, None, x),
            lambda a, w, x: reference.kept_down_proj_reference(a, w, wave.keep, group, None, x),
            *(channels, columns, x),
        ),
        "kept_head_proj": lambda: within(
            ops.kept_head_proj(
                *(x, head_bank, *heads.tables, None, None, angles.cos(), angles.sin(), places),
                head_dim=64,
            ),
            lambda x, w: reference.kept_head_proj_reference(
                *(x, w, heads.keep, group, None, None, angles.cos(), angles.sin(), places),
                num_slots=slots,
            ),
            *(x, head_bank),
        ),
        "grouped_attention": lambda: within(
            ops.grouped_attention(q, k, v, *attend, sequences, scale=0.125, window=50),
            lambda q, k, v: reference.grouped_attention_reference(
                *(q, k, v, *attend, sizes, [0, 1, 2, 3]), scale=0.125, window=50
            ),
            *(q, k, v),
        ),
        "kept_o_proj": lambda: within(
            ops.kept_o_proj(q, output, *heads.tables, None, x),
            lambda a, w, x: reference.kept_o_proj_reference(a, w, heads.keep, group, None, x),
            *(q, output, x),
        ),
        "lm_head_nll": lambda: within(
            ops.lm_head_nll(x, vocabulary, labels),
            lambda x, w: reference.lm_head_nll_reference(x, w, labels),
            *(x, vocabulary),
        ),
        "token_nll": lambda: within(
            ops.token_nll(x @ vocabulary.T, labels),
            lambda logits: reference.token_nll_reference(logits, labels),
            x @ vocabulary.T,
        ),
        "compact": copies,
        "column_moments": moments,
    }


def engines(report: Report, device: torch.device) -> None:
    """Each route of the fused engine against the hooks engine, on a tiny model.

    With the parent's output projections, and with sub-models' own.
    """
    report.begin("engines", "routes of the engine against hooks, a tiny model")
    shape = ModelShape(
        name="tiny", hidden_size=192, intermediate_size=320, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, vocab_size=1000,
    )  # fmt: skip
    model = random_model(shape, 3, torch.float32, device)
    layout = Layout.of(model, attention="head", sublayers=True)
    drawn = torch.rand(12, len(layout), generator=torch.Generator().manual_seed(1)) < 0.8
    # some routes score the first half, those of later rounds the other
    keep = torch.cat([drawn, round_masks(layout, 12, 0.1)])
    tokens = torch.arange(3 * 150).view(3, 150) * 7 % 1000
    own = partial(_halved, model)
    exact = {
        weights: MaskScorer(model, layout=layout, engine="hooks").score(
            keep, tokens, output_weights=weights
        )
        for weights in (None, own)
    }
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        scorer = MaskScorer(model, layout=layout, engine="hooks")
        for weights, truth in exact.items():
            hooks = scorer.score(keep, tokens, output_weights=weights)
            for route in (*ROUTES, *ROUND_ROUTES[1:]):
                if weights is not None and route == "split":
                    continue  # it is refused
                name = route if weights is None else f"{route}, own outputs"
                rows = slice(None, 12) if route in ROUTES else slice(12, None)
                budget = FLOAT32_TOLERANCE
                if dtype == torch.bfloat16:
                    budget += BFLOAT16_FACTOR * float((hooks[rows] - truth[rows]).abs().max())
                report.need(5, f"{name} in {dtype}")
                with report.case("engines"):
                    fused = MaskScorer(model, layout=layout, engine="fused", route=route)
                    scored = fused.score(keep[rows], tokens, output_weights=weights)
                    error = float((scored - truth[rows]).abs().max())
                    if not error <= budget:
                        raise AssertionError(
                            f"{name}, {dtype}: errs by {error:.3g}, not {budget:.3g}"
                        )
                    report.add(
                        "engines",
                        f"{name:20} {dtype!s:15} errs by {error:.2g} of {budget:.2g} nats",
                        route=name, dtype=str(dtype), error=error, budget=budget,
                    )  # fmt: skip


def _halved(model: PreTrainedModel, block: Block, keep_parts: Tensor) -> OutputProjection:
    """Half of the parent's output projection, for every mask."""
    weight = model.get_submodule(block.output).weight
    columns = keep_parts.repeat_interleave(block.part_width).to(weight.device)
    return OutputProjection(0.5 * weight[:, columns])
