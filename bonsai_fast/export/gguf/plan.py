"""What a GGUF will hold, layer by layer, decided before anything is written.

llama.cpp reads per-layer widths for every architecture, but only two plain pre-norm SwiGLU blocks
use them: `deci` (LLaMA's block) and `openelm` (q and k normalised, embeddings tied). A uniform
model keeps its parent's architecture.

A removed sub-layer is left out only where the engine computes the right thing without it:

* a layer that keeps nothing is the identity, and is dropped;
* `deci` takes a layer without attention, except as layer 0, whose head count sizes the rotary
  embedding;
* a layer that keeps its attention and has no MLP would silently lose the attention, too.

All other cases get a stub: one head, or `STUB_CHANNELS` channels, of zeros.
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
        shape: what of it the model keeps.
        num_heads, num_kv_heads: heads in the file; 0 if it has no attention.
        channels: width of the MLP in the file, padding included; 0 if it has none.
    """

    source: int
    shape: LayerShape
    num_heads: int
    num_kv_heads: int
    channels: int

    def tensor(self, name: str) -> str:
        """Name of one of its tensors where the model's come from."""
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
    """Decide what becomes of every layer.

    Args:
        shapes: of the model's layers.
        pad_channels_to: MLP widths are padded with zero channels to a multiple of this.
        can_skip_attention: the architecture takes layers without attention.
        keeps_biases: a removed sub-layer leaves a bias behind, so that nothing can be dropped.
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
    if not layers:  # an engine wants at least one
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
    """Whether all layers are alike and complete, as every architecture can express it."""
    return len({layer.widths for layer in layers}) == 1 and layers[0].num_heads > 0
