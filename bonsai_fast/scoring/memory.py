"""How many sequences may be in flight at once, so that scoring stays within its memory budget."""

from __future__ import annotations

import re

import torch

from bonsai_fast.scoring.nll import SequenceNLL
from bonsai_fast.units import Layout

# measured: beyond these, larger batches are no faster
MAX_TOKENS = {"cpu": 4096, "cuda": 16384}
DEFAULT_BUDGET_BYTES = 2 * 2**30
CUDA_FRACTION = 0.5
# allocator slack and small temporaries that the estimate leaves out
SAFETY = 1.3

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(text: str | int) -> int:
    """Bytes in "800MB", "2GiB" or a plain number.

    Raises:
        ValueError: not a positive amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", str(text).upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"memory: expected an amount such as 800MB or 2GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def default_budget(device: torch.device) -> int:
    """Bytes that scoring may use beside the weights by default, the same on every run."""
    if device.type == "cuda":
        return int(CUDA_FRACTION * torch.cuda.get_device_properties(device).total_memory)
    return DEFAULT_BUDGET_BYTES


def rows_within(budget: int, layout: Layout, nll: SequenceNLL, length: int) -> int:
    """Sequences of `length` tokens that fit into `budget` bytes, at least 1.

    Raises:
        ValueError: not even one sequence fits.
    """
    fixed, per_row = working_set(layout, nll, length)
    if fixed + per_row > budget:
        raise ValueError(
            f"memory budget: one sequence of {length} tokens needs about "
            f"{(fixed + per_row) / 2**20:.0f} MiB beside the weights, "
            f"got a budget of {budget / 2**20:.0f} MiB"
        )
    limit = MAX_TOKENS.get(nll.head.weight.device.type, MAX_TOKENS["cpu"])
    return max(1, min((budget - fixed) // per_row, limit // length))


def working_set(layout: Layout, nll: SequenceNLL, length: int) -> tuple[int, int]:
    """Estimated peak of a forward pass beside the weights: (fixed bytes, bytes a sequence)."""
    element = nll.head.weight.element_size()
    hidden = nll.head.weight.shape[1]
    attention = layout.decoder.attention.values()
    width = (
        max((2 * block.num_heads + 2 * block.num_kv_heads) * block.head_dim for block in attention)
        if attention
        else 0
    )
    channels = max((block.num_channels for block in layout.decoder.mlp.values()), default=0)
    # residual, norm in and out, its two float32 temporaries; wider sub-layer with its masked copy
    per_token = element * (4 * hidden + max(2 * width, 4 * channels)) + 2 * 4 * hidden
    scores = 0
    if getattr(
        nll.model.config, "_attn_implementation", None
    ) == "eager" or layout.decoder.model_type.endswith("bloom"):
        # attention weights in the model's dtype, their float32 softmax and its copy
        scores = (
            max((block.num_heads for block in attention), default=0)
            * length**2
            * (2 * element + 2 * 4)
        )
    logits = nll.logit_rows * nll.vocab_size * (element + 1)
    mask = length**2 * element
    return int(SAFETY * (logits + mask)), int(SAFETY * (length * per_token + scores))
