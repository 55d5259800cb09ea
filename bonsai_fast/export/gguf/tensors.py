"""The tensors of a GGUF file, made one at a time from a source of the model's tensors.

A source gives a layer's tensors under llama.cpp's names, unfused, with rows in its own order. Here
rows are reordered for the architecture, tensors are fused and padded, and stubs are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from bonsai_fast.export.gguf.architecture import GGUFPlan
from bonsai_fast.export.gguf.plan import GGUFLayer


class TensorSource(Protocol):
    """A model's tensors under llama.cpp's names: "blk.7.attn_q.bias", "output.weight".

    Attributes:
        rotates_pairs: rows of q and k are in the order for a rotary embedding of neighbours.
        has_head_norms: q and k are normalised, in every layer with an attention.
        head_dim, hidden_size, vocab_size: sizes of the model.
    """

    rotates_pairs: bool
    has_head_norms: bool
    head_dim: int
    hidden_size: int
    vocab_size: int

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in any floating dtype; `has(name)` must be true."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written.

    Attributes:
        name: in the file.
        shape: in PyTorch's order.
        make: returns the tensor, on the CPU, in any floating dtype.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Part:
    """Size of a block's tensor in the file; no columns if it is a vector."""

    rows: int
    columns: int | None = None


def tensor_specs(plan: GGUFPlan, source: TensorSource) -> Iterator[TensorSpec]:
    """All tensors, in the order in which llama.cpp reads them; none is read yet."""
    sizes = {
        "token_embd.weight": (source.vocab_size, source.hidden_size),
        "output_norm.weight": (source.hidden_size,),
        "output.weight": (source.vocab_size, source.hidden_size),
        "rope_freqs.weight": (source.head_dim // 2,),
    }
    for name, shape in sizes.items():
        if source.has(name):
            yield TensorSpec(name, shape, partial(source.get, name))
    for index, layer in enumerate(plan.layers):
        for name, shape, make in _block(plan, source, layer):
            yield TensorSpec(f"blk.{index}.{name}", shape, make)


def _block(
    plan: GGUFPlan, source: TensorSource, layer: GGUFLayer
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    parts = _parts(layer, source.head_dim, source.hidden_size)
    permutes = plan.architecture.rotates_pairs and not source.rotates_pairs
    tensors = {
        name: partial(_fitted, source, layer, name, part, permutes)
        for name, part in parts.items()
        if _is_wanted(source, layer, name)
    }
    if plan.architecture.fuses_qkv and layer.num_heads:
        fused = [f"attn_{name}.weight" for name in "qkv"]
        rows = sum(parts[name].rows for name in fused)
        makers = [tensors.pop(name) for name in fused]
        shape = (rows, source.hidden_size)
        yield "attn_qkv.weight", shape, lambda: torch.cat([make() for make in makers])
    for name, make in tensors.items():
        part = parts[name]
        yield name, (part.rows,) if part.columns is None else (part.rows, part.columns), make


def _parts(layer: GGUFLayer, head_dim: int, hidden_size: int) -> dict[str, _Part]:
    parts = {}
    if layer.num_heads:
        query, key = layer.num_heads * head_dim, layer.num_kv_heads * head_dim
        parts["attn_norm.weight"] = _Part(hidden_size)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            parts[f"attn_{name}.weight"] = _Part(rows, hidden_size)
            parts[f"attn_{name}.bias"] = _Part(rows)
        parts["attn_q_norm.weight"] = parts["attn_k_norm.weight"] = _Part(head_dim)
        parts["attn_output.weight"] = _Part(hidden_size, query)
        parts["attn_output.bias"] = _Part(hidden_size)
    if layer.channels:
        parts["ffn_norm.weight"] = _Part(hidden_size)
        for name in ("gate", "up"):
            parts[f"ffn_{name}.weight"] = _Part(layer.channels, hidden_size)
            parts[f"ffn_{name}.bias"] = _Part(layer.channels)
        parts["ffn_down.weight"] = _Part(hidden_size, layer.channels)
        parts["ffn_down.bias"] = _Part(hidden_size)
    return parts


def _is_wanted(source: TensorSource, layer: GGUFLayer, name: str) -> bool:
    if source.has(layer.tensor(name)):
        return True
    if name.endswith("_norm.weight"):
        # a stub's norm; q and k are normalised in every layer or in none
        return not name.startswith(("attn_q", "attn_k")) or source.has_head_norms
    return _is_stub(layer, name) and not name.endswith(".bias")


def _is_stub(layer: GGUFLayer, name: str) -> bool:
    kept = layer.shape.num_heads if name.startswith("attn") else layer.shape.channels
    return not kept


def _fitted(
    source: TensorSource, layer: GGUFLayer, name: str, part: _Part, permutes: bool
) -> torch.Tensor:
    """A block's tensor, padded to its size in the file, with rows in the file's order."""
    shape = (part.rows,) if part.columns is None else (part.rows, part.columns)
    if not source.has(layer.tensor(name)):
        return torch.ones(shape) if name.endswith("_norm.weight") else torch.zeros(shape)
    tensor = source.get(layer.tensor(name))
    if permutes and name.startswith(("attn_q.", "attn_k.")):
        tensor = pair_order(tensor, source.head_dim)
    if tensor.shape == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


def pair_order(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of every head: halves (i, i + K/2) become neighbours (2i, 2i + 1).

    Args:
        tensor: [H * K, ...], rows of whole heads.
        head_dim: K.
    """
    heads: torch.Tensor = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)
