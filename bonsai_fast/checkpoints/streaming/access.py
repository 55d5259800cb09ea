"""Reading and exchanging the weights of any model, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bonsai_fast.checkpoints.streaming.layer_stream import LayerStream, LayerWeights
from bonsai_fast.models import find_decoder

ATTRIBUTE = "layer_stream"


def stream_of(model: PreTrainedModel) -> LayerStream | None:
    """Where the layers of a streamed model come from; None for a model in memory."""
    found = vars(model).get(ATTRIBUTE)
    return found if isinstance(found, LayerStream) else None


def bring_in_layer(model: PreTrainedModel, index: int) -> None:
    """Have the weights of a decoder layer in memory until another layer is brought in."""
    stream = stream_of(model)
    if stream is not None:
        stream.bring_in(index)


def weight(model: PreTrainedModel, name: str) -> nn.Parameter:
    """A parameter by its name; of a streamed layer, valid until another layer is brought in."""
    stream = stream_of(model)
    if stream is not None and name.startswith(f"{stream.path}."):
        stream.bring_in(int(name[len(stream.path) + 1 :].partition(".")[0]))
    return model.get_parameter(name)


def projection_weight(model: PreTrainedModel, path: str) -> Tensor:
    """The weight of a linear module as [out_features, in_features], however it stores it."""
    found = weight(model, f"{path}.weight").detach()
    return found.T if isinstance(model.get_submodule(path), Conv1D) else found


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()`, each valid until the next one is asked for."""
    for name in [name for name, _ in model.named_parameters()]:
        yield name, weight(model, name)


@contextmanager
def exchanged_weights(model: PreTrainedModel, weights: LayerWeights) -> Iterator[None]:
    """Inside, decoder layers have other weights; afterwards, however it ends, their own.

    Args:
        model: any model. In memory, its own weights are meanwhile kept where the others are, so
            that a GPU holds one set.
        weights: number of a layer -> other weights by their names in the model, or None. Of a
            streamed model, called whenever the layer is brought in.
    """
    stream = stream_of(model)
    if stream is not None:
        with stream.exchanged(weights):
            yield
        return
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for number in range(find_decoder(model).num_layers):
            for name, other in (weights(number) or {}).items():
                parameter = model.get_parameter(name)
                own.append((parameter, parameter.data.to(other.device)))
                parameter.data = other.to(parameter.device)
        yield
    finally:
        for parameter, data in reversed(own):
            parameter.data = data.to(parameter.device)
