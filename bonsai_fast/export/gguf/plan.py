"""Plan the layers of a GGUF file, before anything is written.

llama.cpp reads per-layer widths for every architecture, but only two plain pre-norm SwiGLU blocks
use them: `deci` (LLaMA's block) and `openelm` (q and k normalised, embeddings tied). A uniform
model keeps its parent's architecture.

A removed sub-layer is left out only if llama.cpp then computes the same:

* A layer that keeps nothing is the identity and is left out.
* `deci` accepts a layer without attention, except layer 0, whose head count sets the size of the
  rotary embedding.
* A layer with attention and without MLP would silently lose its attention, too.

In all other cases a removed sub-layer becomes a stub of zeros: one head, or `STUB_CHANNELS`
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bonsai_fast.hub import LayerShape

STUB_CHANNELS = 32


@dataclass(frozen=True)
class GGUFLayer:
    """One layer of the file.

    Attributes:
        source: number of the layer in the model.
        shape: what the model keeps of that layer.
        num_heads, num_kv_heads: heads in the file; 0 if it has no attention.
        channels: width of the MLP in the file, padding included; 0 if it has none.
    """

    source: int
    shape: LayerShape
    num_heads: int
    num_kv_heads: int
    channels: int

    def tensor(self, name: str) -> str:
        """Name of one of its tensors in the source of tensors."""
        return f"blk.{self.source}.{name}"

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.channels


def plan_layers(
    shapes: Sequence[LayerShape],
    *,
    pad_channels_to: int,
    can_skip_attention: bool,
    keeps_biases: bool,
) -> tuple[GGUFLayer, ...]:
    """Decide the widths of every layer in the file.

    Args:
        shapes: of the model's layers.
        pad_channels_to: MLP widths are padded with zero channels to a multiple of this.
        can_skip_attention: the architecture accepts layers without attention.
        keeps_biases: a removed sub-layer leaves a bias, so no sub-layer can be left out.
    Raises:
        ValueError: the KV groups of a layer keep different numbers of query heads.
    """
    layers = []
    for index, shape in enumerate(shapes):
        if shape.is_irregular:
            raise ValueError(
                f"layer {index}: KV heads serve {list(shape.q_heads_per_kv)} query heads, but "
                "llama.cpp shares them evenly; prune with --head-layout rectangular"
            )
        if shape.num_heads or shape.channels or keeps_biases:
            channels = -(-shape.channels // pad_channels_to) * pad_channels_to
            layers.append(GGUFLayer(index, shape, shape.num_heads, shape.num_kv_heads, channels))
    if not layers:  # llama.cpp needs at least one
        layers = [GGUFLayer(0, shapes[0], 0, 0, 0)]
    return tuple(
        _with_stubs(layer, position == 0 or not can_skip_attention or keeps_biases, pad_channels_to)
        for position, layer in enumerate(layers)
    )


def _with_stubs(layer: GGUFLayer, needs_attention: bool, pad_channels_to: int) -> GGUFLayer:
    if needs_attention and not layer.num_heads:
        layer = replace(layer, num_heads=1, num_kv_heads=1)
    if not layer.channels:
        layer = replace(layer, channels=max(STUB_CHANNELS, pad_channels_to))
    return layer


def is_uniform(layers: Sequence[GGUFLayer]) -> bool:
    """Whether all layers are equal and have an attention, as every architecture can express."""
    return len({layer.widths for layer in layers}) == 1 and layers[0].num_heads > 0
