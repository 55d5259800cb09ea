"""Sections of gpu.py about the speed of single kernels, beside the vendor's library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from gpu_report import Report
from torch import Tensor
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.evaluation.peak_memory import PeakMemory
from bonsai_fast.scoring.fused.gpu_rates import best_seconds
from bonsai_fast.testing.cases import (
    ModelShape,
    Wave,
)

GLU = {"activation": "silu", "gated": True}
LOGIT_ROWS = 2048


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is timed.

    Attributes:
        shapes: of the models.
        rows, num_groups: rows of a product, and sub-models that share them.
        lengths: of sequences, for attention.
        tokens: for losses.
        masked: shares of units that are removed.
        dtype: of all tensors.
    """

    shapes: tuple[ModelShape, ...]
    rows: int
    num_groups: int
    lengths: tuple[int, ...]
    tokens: int
    masked: tuple[float, ...]
    dtype: torch.dtype


def wave_of(
    num_units: int, masked: float, rows: int, num_groups: int, device: torch.device, multiple: int
) -> Wave:
    """Sub-models that each keep the same number of random units."""
    draws = torch.rand(num_groups, num_units, generator=torch.Generator().manual_seed(0))
    keep = draws.argsort(dim=1).argsort(dim=1) >= round(masked * num_units)
    return Wave.of(keep, [rows // num_groups] * num_groups, multiple=multiple, device=device)


def ratios(report: Report, device: torch.device, scale: Scale) -> None:
    """Speed of each gather kernel over the vendor's product, per kept operation."""
    report.begin("ratios", f"r, kernel over vendor's product per operation, {scale.rows} rows")
    for shape in scale.shapes:
        for masked in scale.masked:
            for name, (kernel, vendor, kept) in _products(shape, masked, device, scale).items():
                report.need(3, f"{name} {shape} {masked:.0%}")
                with report.case("ratios"):
                    ours, theirs = best_seconds(device, kernel), best_seconds(device, vendor)
                    ratio = kept * theirs / ours
                    report.add(
                        "ratios",
                        f"{shape.name:12} {name:15} {masked:4.0%} masked  r {ratio:5.2f}  "
                        f"({1e3 * ours:8.3f} ms, whole product {1e3 * theirs:8.3f} ms)",
                        shape=shape.name, op=name, masked=masked, r=ratio,
                        kernel_seconds=ours, vendor_seconds=theirs,
                    )  # fmt: skip


Products = dict[str, tuple[Callable[[], object], Callable[[], object], float]]


def _products(shape: ModelShape, masked: float, device: torch.device, scale: Scale) -> Products:
    options = {"dtype": scale.dtype, "device": device}
    rows, width, channels = scale.rows, shape.hidden_size, shape.intermediate_size
    dim, num_heads = shape.head_dim, shape.num_attention_heads
    wave = wave_of(channels, masked, rows, scale.num_groups, device, 128)
    heads = wave_of(num_heads, masked, rows, scale.num_groups, device, 1)

    def random(*sizes: int) -> Tensor:
        # on the device: these are large
        return torch.randn(sizes, **options).mul_(sizes[-1] ** -0.5)

    x, bank, columns = random(rows, width), random(2 * channels, width), random(channels, width)
    query, output = random(num_heads * dim, width), random(width, num_heads * dim)
    activations = random(rows, wave.kept.width)
    whole, all_heads = random(rows, channels), random(rows, num_heads * dim)
    kept_heads = random(rows, heads.kept.width, dim)
    angles = torch.randn(scale.lengths[0], dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    places = torch.arange(rows, device=device) % len(angles)
    share = float(wave.keep.float().mean())
    head_share = float(heads.keep.float().mean())
    rotate = (None, None, cos, sin, places)
    return {
        "kept_up_proj": (
            lambda: ops.kept_up_proj(x, bank, *wave.tables, **GLU), lambda: x @ bank.T, share,
        ),
        "kept_down_proj": (
            lambda: ops.kept_down_proj(activations, columns, *wave.tables),
            lambda: whole @ columns,
            share,
        ),
        "kept_head_proj": (
            lambda: ops.kept_head_proj(x, query, *heads.tables, *rotate, head_dim=dim),
            lambda: x @ query.T,
            head_share,
        ),
        "kept_o_proj": (
            lambda: ops.kept_o_proj(kept_heads, output, *heads.tables),
            lambda: all_heads @ output.T,
            head_share,
        ),
    }  # fmt: skip


def copies(report: Report, device: torch.device, scale: Scale) -> None:
    """Rates of the workspace copies beside a plain copy and PyTorch's index_select."""
    report.begin("copies", "copies of kept weights, bytes read and written")
    for shape in scale.shapes:
        source = torch.randn(
            shape.intermediate_size, shape.hidden_size, dtype=scale.dtype, device=device
        )
        other = source.T.contiguous()
        keep = torch.rand(len(source), generator=torch.Generator().manual_seed(0)) < 0.7
        index = keep.nonzero()[:, 0].to(device, torch.int32)
        long = index.long()
        rows = source.new_empty(len(index), source.shape[1])
        columns = source.new_empty(source.shape[1], len(index))
        plain = torch.empty_like(rows)
        for name, work in {
            "plain copy": partial(plain.copy_, source[: len(index)]),
            "compact_rows": partial(ops.compact_rows, source, index, rows),
            "index_select rows": partial(torch.index_select, source, 0, long, out=rows),
            "compact_columns": partial(ops.compact_columns, other, index, columns),
            "index_select columns": partial(torch.index_select, other, 1, long, out=columns),
        }.items():
            report.need(3, f"{name} {shape}")
            with report.case("copies"):
                seconds = best_seconds(device, work)
                rate = 2 * rows.nbytes / seconds / 1e9
                report.add(
                    "copies", f"{shape.name:12} {name:20} {rate:8.1f} GB/s",
                    shape=shape.name, copy=name, gb_per_s=rate, seconds=seconds,
                )  # fmt: skip


def attention(report: Report, device: torch.device, scale: Scale) -> None:
    """grouped_attention of kept heads beside PyTorch's of all heads, causal."""
    report.begin("attention", "causal attention: kept heads by us, all heads by PyTorch")
    for shape in scale.shapes:
        for length in scale.lengths:
            for masked in scale.masked[:2]:
                report.need(5, f"{shape} {length} {masked:.0%}")
                with report.case("attention"):
                    ours, theirs, kept = _attention_seconds(shape, length, masked, device, scale)
                    report.add(
                        "attention",
                        f"{shape.name:12} {length:5} tokens {masked:4.0%} masked  ours "
                        f"{1e3 * ours:8.3f} ms, PyTorch {1e3 * theirs:8.3f} ms, per head "
                        f"{kept * theirs / ours:5.2f}x",
                        shape=shape.name, length=length, masked=masked, kernel_seconds=ours,
                        vendor_seconds=theirs, ratio_per_head=kept * theirs / ours,
                    )  # fmt: skip


def _attention_seconds(
    shape: ModelShape, length: int, masked: float, device: torch.device, scale: Scale
) -> tuple[float, float, float]:
    count = max(1, scale.rows // length)
    num_heads, dim = shape.num_attention_heads, shape.head_dim
    draws = torch.rand(count, num_heads, generator=torch.Generator().manual_seed(0))
    keep = draws.argsort(dim=1).argsort(dim=1) >= round(masked * num_heads)
    lists = ops.HeadLists.of(keep, num_kv_heads=shape.num_key_value_heads, device=device)
    tiles = ops.SequencePlan.of([length] * count, range(count), device=device).tiles

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=scale.dtype, device=device)

    q = random(count * length, lists.query.width, dim)
    k, v = (random(count * length, lists.kv.width, dim) for _ in range(2))
    whole = random(count, num_heads, length, dim)
    key, value = (random(count, shape.num_key_value_heads, length, dim) for _ in range(2))
    ours = best_seconds(
        device,
        lambda: ops.grouped_attention(
            q, k, v, lists.query.count, lists.q_to_kv, tiles, scale=dim**-0.5
        ),
    )
    theirs = best_seconds(
        device,
        lambda: F.scaled_dot_product_attention(
            whole, key, value, is_causal=True, enable_gqa=key.shape[1] != num_heads
        ),
    )
    return ours, theirs, float(keep.float().mean())


def losses(report: Report, device: torch.device, scale: Scale) -> None:
    """Losses from hidden states: by one op, by chunks of logits, and by all logits."""
    report.begin("losses", f"losses of {scale.tokens} tokens from hidden states")
    for shape in scale.shapes:
        size = (shape.vocab_size, shape.hidden_size)
        head = torch.randn(size, dtype=scale.dtype, device=device).mul_(size[1] ** -0.5)
        x = torch.randn(scale.tokens, size[1], dtype=scale.dtype, device=device)
        labels = torch.randint(size[0], (scale.tokens,), device=device)
        for name, work in {
            "lm_head_nll": partial(ops.lm_head_nll, x, head, labels),
            "chunks of logits": partial(_chunked, x, head, labels),
            "all logits": partial(_materialized, x, head, labels),
        }.items():
            report.need(5, f"{name} {shape}")
            with report.case("losses"):
                work()
                with PeakMemory(device) as peak:
                    work()
                seconds = best_seconds(device, work)
                text = "" if peak.bytes is None else f", {peak.bytes / 2**20:,.0f} MiB"
                report.add(
                    "losses", f"{shape.name:12} {name:17} {1e3 * seconds:9.3f} ms{text}",
                    shape=shape.name, way=name, seconds=seconds, peak_bytes=peak.bytes,
                )  # fmt: skip


def _chunked(x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    parts = zip(x.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
    return torch.cat([ops.token_nll(F.linear(rows, head), part) for rows, part in parts])


def _materialized(x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, head).float(), labels, reduction="none")
