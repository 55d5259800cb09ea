"""glu_mask against what one would write without it, at the widths of real models."""

from __future__ import annotations

from functools import partial

import torch
from op_comparison import NUM_GROUPS, WIDTHS, compare
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import assert_within_baseline, random_keep, random_tensor
from bonsai_fast.testing.reference import glu_mask_reference


def eager(gate_up, keep, row_group, *, activation, gated):
    """Two activations and a mask that multiplies: what hooks on a model do."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up * keep[row_group.long()].to(gate_up.dtype)


IMPLS = {"eager": eager, "op": ops.glu_mask}
NUM_TOKENS = {"cpu": 512, "cuda": 16384}


@compare(width=WIDTHS, dtype=[torch.bfloat16, torch.float32], impl=IMPLS)
def bench_glu_mask(benchmark, record_traffic, repeats, device, width, dtype, impl):
    num_tokens, width = (8, 90) if width is None else (NUM_TOKENS[device.type], width)
    plan = ops.RowPlan.of([num_tokens // NUM_GROUPS] * NUM_GROUPS, device=device)
    gate_up = random_tensor(num_tokens, 2 * width, dtype=dtype, device=device)
    arguments = (gate_up, random_keep(NUM_GROUPS, width).to(device), plan.row_group)
    options = {"activation": "silu", "gated": True}
    benchmark.group = f"glu_mask [{num_tokens}, {width}] {dtype}"
    out = benchmark.pedantic(partial(IMPLS[impl], **options), args=arguments, **repeats)
    record_traffic(
        num_bytes=gate_up.nbytes + out.nbytes,
        # A sigmoid takes an exponential, a sum and a quotient; then two products.
        num_flops=5 * out.numel(),
    )
    assert_within_baseline(out, partial(glu_mask_reference, **options), *arguments)
