"""Write a streamed model tensor by tensor; two of its layers are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from bonsai_fast.checkpoints.safetensors_writer import write_model_weights
from bonsai_fast.checkpoints.saved_names import saved_names
from bonsai_fast.checkpoints.streaming import weight


def write_streamed(model: PreTrainedModel, directory: Path) -> None:
    """Write the files that the loaded model's own `save_pretrained(directory)` would, to the byte.

    Args:
        model: streamed; weights exchanged by `exchanged_weights` are the ones that are written.
        directory: an existing directory.
    Raises:
        ValueError: saving changes more than the names of tensors.
        OSError: a file cannot be written.
    """
    # on the meta device, where all layers are alike, ties are known by their parameters
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    state = remove_tied_weights_from_state_dict(state, model)
    parts = saved_names(model, state)

    def blocks(stored: str) -> Iterator[Tensor]:
        yield parts[stored].of(_tensor(model, parts[stored].name)).cpu()

    # configuration, generation configuration and Python files
    model.save_pretrained(directory, state_dict={})
    write_model_weights(
        directory,
        {stored: part.of(state[part.name]) for stored, part in parts.items()},
        blocks,
        num_parameters=model.num_parameters(),
        metadata={"format": "pt"},
    )


def _tensor(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter or buffer by its name in the model's state."""
    module, _, attribute = name.rpartition(".")
    buffer = model.get_submodule(module)._buffers.get(attribute)
    found: torch.Tensor = weight(model, name) if buffer is None else buffer
    return found.detach()
