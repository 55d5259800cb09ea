"""Layouts of models without weights, and relevances to choose by."""

from functools import cache

import torch
from hypothesis import settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from bonsai_fast.methods.allocation import Target
from bonsai_fast.models.layout import Layout


@cache
def layout(family="llama", attention="head", sublayers=False):
    with torch.device("meta"):
        if family == "gpt_neox":
            model = GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    hidden_size=32,
                    num_attention_heads=4,
                    intermediate_size=64,
                    num_hidden_layers=3,
                    vocab_size=11,
                )
            )
        else:
            model = LlamaForCausalLM(llama(family))
    return Layout.of(model, attention=attention, sublayers=sublayers)


def llama(size):
    hidden, heads, kv_heads, width, layers = {
        "llama": (24, 6, 2, 48, 3),
        "smollm2": (576, 9, 3, 1536, 30),
        "wide": (64, 4, 2, 8192, 2),
        "odd": (64, 4, 2, 1000, 2),
    }[size]
    return LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=width,
        num_hidden_layers=layers,
        vocab_size=100,
        tie_word_embeddings=True,
    )


LAYOUTS = [
    ("llama", "head", False),
    ("llama", "kv-group", False),
    ("llama", "head", True),
    ("gpt_neox", "head", False),
    ("gpt_neox", "kv-group", True),
]
any_layout = st.sampled_from(LAYOUTS).map(lambda key: layout(*key))
seeds = st.integers(0, 2**31)
sparsities = st.floats(0.02, 0.95)
property_test = settings(max_examples=25, deadline=None)


def budget_of(of, sparsity):
    """Parameters to remove."""
    return Target(sparsity=sparsity).removal_budget(of)


def all_kept(of):
    return torch.ones(len(of), dtype=torch.bool)


def random_relevance(of, seed, negative=False):
    """Larger for larger units, as relevance is."""
    generator = torch.Generator().manual_seed(seed)
    size = of.num_parameters_per_unit.double()
    return (torch.rand(len(of), generator=generator, dtype=torch.float64) - 0.2 * negative) * size


def removed_and_budget(of, keep, sparsity):
    return of.num_removed_parameters(keep), budget_of(of, sparsity)
