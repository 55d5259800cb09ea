"""Models and masks of gpu.py: published shapes with random weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bonsai_fast.models.layout import Layout
from bonsai_fast.testing.cases import ModelShape

# Share of each sub-layer's units that a later round has removed from all sub-models.
GONE = 0.3


def random_model(
    shape: ModelShape, layers: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A LLaMA of this shape with random weights."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def random_masks(layout: Layout, count: int, masked: float) -> torch.Tensor:
    """Keep masks, bool [S, P]: each sub-layer loses the same share of its units, at random."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.ones(count, len(layout), dtype=torch.bool)
    for group in layout.groups:
        order = torch.rand(count, len(group), generator=generator).argsort(dim=1).argsort(dim=1)
        keep[:, group.start : group.stop] = order >= round(masked * len(group))
    return keep


def round_masks(layout: Layout, count: int, masked: float) -> torch.Tensor:
    """Keep masks of a later round, bool [S, P].

    All sub-models lack the same units of each sub-layer. Some of the others are candidates, again
    the same for all: each sub-model masks half of them at random.
    """
    generator = torch.Generator().manual_seed(0)
    keep = torch.ones(count, len(layout), dtype=torch.bool)
    for group in layout.groups:
        order = torch.randperm(len(group), generator=generator)
        gone, half = round(GONE * len(group)), round(masked * (1 - GONE) * len(group))
        keep[:, group.start + order[:gone]] = False
        candidates = group.start + order[gone : gone + 2 * half]
        draw = torch.rand(count, 2 * half, generator=generator).argsort(dim=1).argsort(dim=1)
        keep[:, candidates] = draw >= half
    return keep


def layers_that_fit(shape: ModelShape, total: int, device: torch.device) -> int:
    """All layers, or as many as leave a third of a GPU's free memory for the computation."""
    if device.type != "cuda":
        return total
    heads = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads
    columns = 3 * shape.intermediate_size + heads * shape.head_dim
    layer = 2 * shape.hidden_size * columns
    room = torch.cuda.mem_get_info(device)[0] * 2 / 3 - 4 * shape.vocab_size * shape.hidden_size
    return max(2, min(total, int(room // layer)))
