"""token_nll against what one would write without it, on the vocabularies of real models."""

from __future__ import annotations

import pytest
import torch
from op_comparison import compare
from torch.nn import functional as F

from bonsai_fast import ops
from bonsai_fast.testing.cases import MODEL_SHAPES, assert_within_baseline, random_logits
from bonsai_fast.testing.reference import token_nll_reference


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


IMPLS = {
    "reference": token_nll_reference,
    "cross_entropy": cross_entropy,
    "op": ops.token_nll,
}
NUM_TOKENS = {"cpu": 512, "cuda": 4096}
VOCABULARIES = [
    pytest.param(None, id="smoke"),
    *(pytest.param(shape.vocab_size, id=shape.name) for shape in MODEL_SHAPES),
]


@compare(vocab_size=VOCABULARIES, dtype=[torch.bfloat16, torch.float32], impl=IMPLS)
def bench_token_nll(benchmark, record_traffic, repeats, device, vocab_size, dtype, impl):
    num_tokens = 4 if vocab_size is None else NUM_TOKENS[device.type]
    logits, labels = random_logits(num_tokens, vocab_size or 509, dtype=dtype, device=device)
    benchmark.group = f"token_nll {list(logits.shape)} {dtype}"
    nll = benchmark.pedantic(IMPLS[impl], args=(logits, labels), **repeats)
    record_traffic(
        # What must be moved, whatever an implementation moves.
        num_bytes=logits.nbytes + labels.nbytes + nll.nbytes,
        # A logit takes a maximum, a difference, an exponential and a sum.
        num_flops=4 * logits.numel(),
    )
    assert_within_baseline(nll, token_nll_reference, logits, labels)
