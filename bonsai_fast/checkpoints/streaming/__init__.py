"""Models whose layers are read from files or host memory, one at a time, while they run.

`open_streamed(directory)` and `stream_layers(model)` make one. It runs like a model in memory; give
it as many tokens as possible at a time, because every pass reads all its layers.
"""

from bonsai_fast.checkpoints.memory import device_memory, local_directory, weight_bytes
from bonsai_fast.checkpoints.streaming.access import (
    bring_in_layer,
    exchanged_weights,
    named_weights,
    projection_weight,
    stream_of,
    weight,
)
from bonsai_fast.checkpoints.streaming.layer_stream import LayerStream, LayerWeights, Origin
from bonsai_fast.checkpoints.streaming.open import open_streamed, stream_layers

__all__ = [
    "LayerStream",
    "LayerWeights",
    "Origin",
    "bring_in_layer",
    "device_memory",
    "exchanged_weights",
    "local_directory",
    "named_weights",
    "open_streamed",
    "projection_weight",
    "stream_layers",
    "stream_of",
    "weight",
    "weight_bytes",
]
