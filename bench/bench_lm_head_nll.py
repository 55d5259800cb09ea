"""lm_head_nll against the LM head followed by cross-entropy, whole and in chunks."""

from __future__ import annotations

import torch
from op_comparison import SHAPES, compare, options_of
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import assert_within_baseline, random_tensor
from bonsai_fast.testing.reference import lm_head_nll_reference

CHUNK_ROWS = 2048


def materialized(x, weight, labels):
    """What a Hugging Face model does with labels."""
    return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="none")


def chunked(x, weight, labels):
    """The LM head by the vendor's matrix product, a few thousand rows at a time."""
    parts = zip(x.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True)
    return torch.cat([ops.token_nll(F.linear(rows, weight), part) for rows, part in parts])


IMPLS = {"materialized": materialized, "chunked": chunked, "op": ops.lm_head_nll}
NUM_TOKENS = {"cpu": 128, "cuda": 8192}


@compare(shape=SHAPES, impl=IMPLS)
def bench_lm_head_nll(benchmark, record_traffic, repeats, device, shape, impl):
    num_tokens, hidden, vocab = (6, 48, 203) if shape is None else (
        NUM_TOKENS[device.type], shape.hidden_size, shape.vocab_size
    )  # fmt: skip
    options = options_of(shape, device)
    x = random_tensor(num_tokens, hidden, **options)
    weight = random_tensor(vocab, hidden, scale=4 * hidden**-0.5, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(vocab, (num_tokens,), generator=generator).to(device)
    benchmark.group = f"lm_head_nll {shape} {num_tokens} rows"
    nll = benchmark.pedantic(IMPLS[impl], args=(x, weight, labels), **repeats)
    record_traffic(
        num_bytes=x.nbytes + weight.nbytes + labels.nbytes + nll.nbytes,
        num_flops=2 * num_tokens * hidden * vocab,
        gemm=options["dtype"],
    )
    assert_within_baseline(nll, lm_head_nll_reference, x, weight, labels)
