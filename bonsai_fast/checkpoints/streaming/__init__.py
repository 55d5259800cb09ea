"""Models whose layers are not in memory: their weights come from files or host memory in turns.

`open_streamed(directory)` and `stream_layers(model)` make one. Such a model runs like any other, as
many tokens as possible at a time, since every pass reads all its layers.
"""

from bonsai_fast.checkpoints.memory import device_memory, local_directory, weight_bytes
from bonsai_fast.checkpoints.streaming.access import (
    bring_in_layer,
    named_weights,
    stream_of,
    weight,
)
from bonsai_fast.checkpoints.streaming.layer_stream import LayerStream, Origin
from bonsai_fast.checkpoints.streaming.open import open_streamed, stream_layers

__all__ = [
    "LayerStream",
    "Origin",
    "bring_in_layer",
    "device_memory",
    "local_directory",
    "named_weights",
    "open_streamed",
    "stream_layers",
    "stream_of",
    "weight",
    "weight_bytes",
]
