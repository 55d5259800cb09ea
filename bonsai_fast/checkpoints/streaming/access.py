"""Reading the weights of any model, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming.layer_stream import LayerStream

ATTRIBUTE = "layer_stream"


def stream_of(model: PreTrainedModel) -> LayerStream | None:
    """Where the layers of a streamed model come from; None for any other."""
    found = vars(model).get(ATTRIBUTE)
    return found if isinstance(found, LayerStream) else None


def bring_in_layer(model: PreTrainedModel, index: int) -> None:
    """Have the weights of a decoder layer in memory until those of another are asked for."""
    stream = stream_of(model)
    if stream is not None:
        stream.bring_in(index)


def weight(model: PreTrainedModel, name: str) -> nn.Parameter:
    """A parameter by its name; of a streamed layer, valid until another layer is asked for."""
    stream = stream_of(model)
    if stream is not None and name.startswith(f"{stream.path}."):
        stream.bring_in(int(name[len(stream.path) + 1 :].partition(".")[0]))
    return model.get_parameter(name)


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()`, each valid until the next one is asked for."""
    for name in [name for name, _ in model.named_parameters()]:
        yield name, weight(model, name)
