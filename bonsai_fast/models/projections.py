"""Known shapes of attention and MLP sub-layers, found by their projections, not a model's name.

Each pattern looks at one module's children, checks the widths against each other, and says which
part owns which rows and columns. Owners come from `_owners`; a fused layout is a concatenation or
an interleaving of the same three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from bonsai_fast.models.blocks import Cut

OUTPUT_NAMES = ("o_proj", "out_proj", "dense")


def _owners(first: int, count: int, width: int) -> torch.Tensor:
    """Parts `first..first+count-1`, each owning `width` neighbouring indices."""
    return torch.arange(first, first + count).repeat_interleave(width)


def _cuts(
    module: nn.Module, path: str, rows: dict[str, torch.Tensor], columns: dict[str, torch.Tensor]
) -> tuple[Cut, ...]:
    """Cuts of the projections' weights and, for rows, of their biases; widths are checked."""
    cuts = []
    for dim, owners in ((0, rows), (1, columns)):
        for name, owner in owners.items():
            projection = cast(nn.Linear, module.get_submodule(name))
            size = projection.weight.shape[dim]
            if size != len(owner):
                what = "rows" if dim == 0 else "columns"
                raise ValueError(f"{path}.{name}: expected {len(owner)} {what}, found {size}")
            cuts.append(Cut(f"{path}.{name}.weight", dim, owner))
            if dim == 0 and projection.bias is not None:
                cuts.append(Cut(f"{path}.{name}.bias", 0, owner))
    return tuple(cuts)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)


def output_name(attention: nn.Module) -> str | None:
    """Name of the attention module's output projection."""
    return next((name for name in OUTPUT_NAMES if _has(attention, name)), None)


def separate_qkv(
    module: nn.Module, path: str, heads: int, kv_heads: int, head_dim: int
) -> tuple[Cut, ...] | None:
    """q_proj, k_proj, v_proj: LLaMA, Mistral, Qwen, Gemma, Phi-2, OPT."""
    output = output_name(module)
    if output is None or not _has(module, "q_proj", "k_proj", "v_proj"):
        return None
    query, key = _owners(0, heads, head_dim), _owners(heads, kv_heads, head_dim)
    return _cuts(module, path, {"q_proj": query, "k_proj": key, "v_proj": key}, {output: query})


def stacked_qkv(
    module: nn.Module, path: str, heads: int, kv_heads: int, head_dim: int
) -> tuple[Cut, ...] | None:
    """qkv_proj with rows [all q | all k | all v]: Phi-3."""
    output = output_name(module)
    if output is None or not _has(module, "qkv_proj"):
        return None
    query, key = _owners(0, heads, head_dim), _owners(heads, kv_heads, head_dim)
    return _cuts(module, path, {"qkv_proj": torch.cat([query, key, key])}, {output: query})


def interleaved_qkv(
    module: nn.Module, path: str, heads: int, kv_heads: int, head_dim: int
) -> tuple[Cut, ...] | None:
    """query_key_value, rows [q0 k0 v0 | q1 k1 v1 | ...], one KV head a head: BLOOM, GPT-NeoX."""
    output = output_name(module)
    if output is None or not _has(module, "query_key_value") or heads != kv_heads:
        return None
    query, key = (
        _owners(0, heads, head_dim).view(heads, -1),
        _owners(heads, heads, head_dim).view(heads, -1),
    )
    rows = torch.cat([query, key, key], dim=1).flatten()
    return _cuts(module, path, {"query_key_value": rows}, {output: query.flatten()})


ATTENTION_PATTERNS: dict[str, Callable[[nn.Module, str, int, int, int], tuple[Cut, ...] | None]] = {
    "q_proj + k_proj + v_proj": separate_qkv,
    "qkv_proj (stacked)": stacked_qkv,
    "query_key_value (interleaved, one KV head a query head)": interleaved_qkv,
}

# (input projections, output projection); fused, the second input is stacked below the first
MLP_PATTERNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("fc1",), "fc2"),
)


def mlp_cuts(
    module: nn.Module, path: str
) -> tuple[str, tuple[str, ...], int, tuple[Cut, ...]] | None:
    """Find an MLP among a module's projections: (output name, all names, channel count, cuts)."""
    for inputs, output in MLP_PATTERNS:
        if not _has(module, *inputs, output):
            continue
        channels = getattr(module, output).in_features
        owner = torch.arange(channels)
        fused = torch.cat([owner, owner]) if inputs == ("gate_up_proj",) else owner
        return (
            output,
            (*inputs, output),
            channels,
            _cuts(module, path, dict.fromkeys(inputs, fused), {output: owner}),
        )
    return None
