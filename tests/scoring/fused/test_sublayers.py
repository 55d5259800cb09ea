"""The fused engine's own arithmetic against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.causal_attention import (
    BLOCK_TOKENS,
    _by_blocks,
    attention,
)
from bonsai_fast.scoring.fused.read_norm import read_norm
from bonsai_fast.testing.cases import ATOL, DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_empty")
LENGTHS = [1, 2, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS - 5]


def heads(dtype: torch.dtype, num_heads: int, shared: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, count, length, 24, generator=generator).to(dtype)
        for count in (num_heads, num_heads // shared, num_heads // shared)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("num_heads", "shared"), [(1, 1), (6, 1), (6, 3), (5, 5)])
def test_blocks_equal_pytorch_attention(
    num_heads: int, shared: int, length: int, dtype: torch.dtype
) -> None:
    query, key, value = heads(dtype, num_heads, shared, length)
    exact = [x.double() for x in (query, key, value)]
    options = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
    truth = F.scaled_dot_product_attention(*exact, **options)
    baseline = F.scaled_dot_product_attention(query, key, value, **options)
    found = _by_blocks(query, key, value, 0.3)
    assert found.shape == (2, length, num_heads * 24) and found.is_contiguous()
    found = found.view(2, length, num_heads, 24).transpose(1, 2)
    budget = 2 * float((baseline.double() - truth).abs().max()) + ATOL[dtype]
    assert float((found.double() - truth).abs().max()) <= budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_is_heeded(dtype: torch.dtype) -> None:
    query, key, value = heads(dtype, 6, 3, 70)
    place = torch.arange(70)
    distance = place[:, None] - place[None, :]
    mask = (distance >= 0) & (distance < 9)
    found = attention(query, key, value, scale=0.3, mask=mask)
    exact = [x.double() for x in (query, key, value)]
    truth = F.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True)
    truth = truth.transpose(1, 2).flatten(2)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2 * ATOL[dtype])


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 9, BLOCK_TOKENS + 5, 500])
def test_a_softcap_with_and_without_a_window(
    window: int | None, dtype: torch.dtype, kernels: bool
) -> None:
    length = 2 * BLOCK_TOKENS + 7
    query, key, value = heads(dtype, 6, 3, length)
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]
    mask = (distance >= 0) & (distance < (window or length))
    wide = [x.double() for x in (query, key, value)]
    scores = 0.3 * wide[0].unflatten(1, (2, 3)) @ wide[1][:, :, None].transpose(-1, -2)
    scores = 0.7 * torch.tanh(scores / 0.7)
    truth = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ wide[2][:, :, None]
    truth = truth.flatten(1, 2).transpose(1, 2).flatten(2)
    found = attention(
        *(query, key, value),
        scale=0.3,
        mask=None if window is None else mask,
        window=window,
        softcap=0.7,
        kernels=kernels,
    )
    assert found.shape == truth.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2 * ATOL[dtype])


def test_nan_stays_in_its_sequence_and_heads() -> None:
    query, key, value = heads(torch.bfloat16, 6, 3, 70)
    value[1, 0, 3] = torch.nan
    found = attention(query, key, value, scale=0.3, mask=None)
    assert torch.isfinite(found[0]).all() and not torch.isfinite(found[1, 3:, :72]).any()
    assert torch.isfinite(found[1, :, 72:]).all()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "family",
    [
        LlamaRMSNorm,
        GemmaRMSNorm,
        CohereLayerNorm,
        NemotronLayerNorm1P,
        torch.nn.LayerNorm,
        torch.nn.RMSNorm,
        OlmoLayerNorm,
    ],
)
def test_norm_equals_that_of_the_model(family: type, dtype: torch.dtype, kernels: bool) -> None:
    """Of numbers so small that eps matters, too: OLMo's is a constant."""
    module = (family(41) if family is OlmoLayerNorm else family(41, eps=1e-3)).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=1.0)
    states = torch.randn(2, 5, 3, 41).to(dtype)
    states[1] *= 0.003
    norm = read_norm(module, "norm")
    assert norm.adds_one == (family in (GemmaRMSNorm, NemotronLayerNorm1P))
    assert norm.centred == ("LayerNorm" in family.__name__)
    with torch.no_grad():
        found = Arithmetic(states, kernels=kernels).normalize(norm, states)
        truth, baseline = module.double()(states.double()), module.to(dtype)(states)
    assert found.dtype == dtype
    budget = 2 * float((baseline - truth).abs().max()) + ATOL[dtype]
    assert float((found - truth).abs().max()) <= budget
