"""grouped_attention of kept heads against PyTorch's attention of all heads."""

from __future__ import annotations

import torch
from op_comparison import SHAPES, compare, options_of
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import assert_within_baseline, random_tensor
from bonsai_fast.testing.reference import grouped_attention_reference

NUM_SEQUENCES = 2
LENGTHS = {"cpu": 128, "cuda": 4096}


def dense(q, k, v, *tables, length):
    """All heads, on equal sequences, by the vendor's kernels."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def op(q, k, v, *tables, length):
    return ops.grouped_attention(q, k, v, *tables, scale=q.shape[2] ** -0.5)


IMPLS = {"dense": dense, "op": op}


@compare(shape=SHAPES, masked=[0.0, 0.3], impl=IMPLS)
def bench_grouped_attention(benchmark, record_traffic, repeats, device, shape, masked, impl):
    heads, kv_heads, dim, length = (6, 2, 16, 9) if shape is None else (
        shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim,
        LENGTHS[device.type],
    )  # fmt: skip
    options = options_of(shape, device)
    kept = heads - int(masked * heads)
    lengths, groups = [length] * NUM_SEQUENCES, list(range(NUM_SEQUENCES))
    q = random_tensor(length * NUM_SEQUENCES, heads if impl == "dense" else kept, dim, **options)
    k = random_tensor(length * NUM_SEQUENCES, kv_heads, dim, seed=1, **options)
    v = random_tensor(length * NUM_SEQUENCES, kv_heads, dim, seed=2, **options)
    q_to_kv = torch.arange(kept, device=device, dtype=torch.int32) // (heads // kv_heads)
    q_to_kv = q_to_kv.repeat(NUM_SEQUENCES, 1)
    count = torch.full((NUM_SEQUENCES,), kept, dtype=torch.int32, device=device)
    tiles = ops.SequencePlan.of(lengths, groups, device=device).tiles
    benchmark.group = f"grouped_attention {shape} {lengths}, {masked} masked"
    out = benchmark.pedantic(
        IMPLS[impl],
        args=(q, k, v, count, q_to_kv, tiles),
        kwargs={"length": length},
        **repeats,
    )
    record_traffic(
        num_bytes=2 * out[:, :kept].nbytes + k.nbytes + v.nbytes,
        # Two products over half of all pairs of tokens.
        num_flops=2 * NUM_SEQUENCES * kept * dim * length * length,
        gemm=options["dtype"],
    )
    if impl != "dense":

        def reference(q, k, v):
            return grouped_attention_reference(
                *(q, k, v, count, q_to_kv, lengths, groups), scale=dim**-0.5
            )

        assert_within_baseline(out, reference, q, k, v)
