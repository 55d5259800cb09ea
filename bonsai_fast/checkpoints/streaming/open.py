"""Makes a model whose layers are streamed, from a directory or from host memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bonsai_fast.checkpoints.meta_model import AnyStored, ParentOnDisk, open_parent
from bonsai_fast.checkpoints.safetensors_reader import StoredTensor
from bonsai_fast.checkpoints.streaming.access import ATTRIBUTE, stream_of
from bonsai_fast.checkpoints.streaming.layer_stream import LayerStream, Origin, layer_tensors
from bonsai_fast.checkpoints.streaming.packing import Packing
from bonsai_fast.checkpoints.streaming.sources import HostLayers, StoredLayers, copy_stored
from bonsai_fast.models import UnsupportedModelError, find_decoder


def open_streamed(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Open a saved model that may be larger than memory; two of its layers are in memory at a time.

    Embeddings, last norm and LM head stay on the device (on a CPU, mapped from their files). The
    model computes the same as the loaded one. Each pass reads all layers, the next one while the
    current one computes, so give it many tokens at a time, as `MaskScorer` does.

    Args:
        directory: a model in safetensors, sharded or not, dense or pruned before.
        device: where layers are computed; CUDA if None and there is one.
        dtype: to compute in; that of the checkpoint if None.
        trust_remote_code: build the model from code in the checkpoint.
    Returns:
        the model in evaluation mode. It can be run, scored, measured and saved with
        `surgery.save_pretrained`, but not trained, moved, copied or cut:
        `surgery.slice_checkpoint` cuts its directory.
    Raises:
        ValueError: no such model, quantized, not in safetensors, damaged, tensors are missing, or
            no decoder that can be pruned.
    """
    parent = open_parent(Path(directory), dtype=dtype, trust_remote_code=trust_remote_code)
    target = _device(device)
    model = parent.model
    path, layers = _layers(model)
    inside = tuple(f"{path}.{index}." for index in range(len(layers)))
    twin = _with_buffers(parent, trust_remote_code)
    _take_buffers(model, twin, parent, target)
    _replace_parameters(
        model, lambda name, empty: _resident(parent.tensors[name], empty, target), but=inside
    )
    source = StoredLayers(
        [
            {name: parent.tensors[prefix + name] for name in layer_tensors(layer)}
            for prefix, layer in zip(inside, layers, strict=True)
        ]
    )
    origin = Origin(Path(directory), trust_remote_code)
    setattr(model, ATTRIBUTE, LayerStream(path, layers, source, target, origin))
    model.eval()
    return model


def stream_layers(
    model: PreTrainedModel, *, device: str | torch.device | None = None
) -> PreTrainedModel:
    """Keep a model's layers in host memory, and compute on a GPU that cannot hold them all.

    Args:
        model: loaded on the CPU; changed in place. For CUDA its layers are moved, one by one, to
            pinned memory, which the GPU reads at full speed.
        device: where layers are computed; CUDA if None and there is one.
    Returns:
        the same model, streamed as by `open_streamed`.
    Raises:
        ValueError: its layers are not in the CPU's memory, or are streamed already.
    """
    target = _device(device)
    if stream_of(model) is not None:
        raise ValueError("the model's layers are streamed already")
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise ValueError(f"expected a model on the CPU, found parameters on {sorted(devices)}")
    path, layers = _layers(model)
    inside = tuple(f"{path}.{index}." for index in range(len(layers)))
    source = HostLayers(pinned=target.type == "cuda")
    for layer in layers:
        source.append(Packing.of(layer_tensors(layer)))
        _replace_parameters(layer, lambda _, tensor: torch.empty_like(tensor, device="meta"))
    _replace_parameters(model, lambda _, tensor: tensor.detach().to(target), but=inside)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(target))
    setattr(model, ATTRIBUTE, LayerStream(path, layers, source, target, None))
    model.eval()
    return model


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _layers(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    decoder = find_decoder(model)
    layers = list(model.get_submodule(decoder.path).children())
    owned = [id(parameter) for layer in layers for parameter in layer.parameters()]
    if len(set(owned)) < len(owned):
        raise UnsupportedModelError(f"{type(model).__name__} shares weights between its layers")
    return decoder.path, layers


def _with_buffers(parent: ParentOnDisk, trust_remote_code: bool) -> PreTrainedModel:
    """The same model with the buffers that loading computes, such as rotary frequencies."""
    with init_empty_weights(include_buffers=False):
        twin: PreTrainedModel = AutoModelForCausalLM.from_config(
            parent.model.config, dtype=parent.model.dtype, trust_remote_code=trust_remote_code
        )
    return twin


def _take_buffers(
    model: PreTrainedModel, twin: PreTrainedModel, parent: ParentOnDisk, device: torch.device
) -> None:
    for (path, module), other in zip(model.named_modules(), twin.modules(), strict=True):
        for name, buffer in other.named_buffers(recurse=False):
            stored = parent.tensors.get(f"{path}.{name}" if path else name)
            if stored is not None:
                copy_stored(stored, buffer)
            setattr(module, name, buffer.to(device))
        for name, value in list(vars(other).items()):
            if isinstance(value, Tensor):
                setattr(module, name, value.to(device))


def _resident(stored: AnyStored, empty: Tensor, device: torch.device) -> Tensor:
    """A tensor that stays in memory; on a CPU mapped from its file if dtype and alignment allow."""
    if (
        isinstance(stored, StoredTensor)
        and device.type == "cpu"
        and stored.dtype == empty.dtype
        and stored.start % stored.dtype.itemsize == 0
    ):
        return stored.mapped()
    tensor = torch.empty_like(empty, device=device)
    copy_stored(stored, tensor)
    return tensor


def _replace_parameters(
    root: nn.Module, make: Callable[[str, nn.Parameter], Tensor], *, but: tuple[str, ...] = ()
) -> None:
    """Give every parameter other data, except under the prefixes `but`; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(_all_parameters(root)):
        if but and name.startswith(but):
            continue
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(make(name, parameter), requires_grad=False)
        module, _, attribute = name.rpartition(".")
        setattr(root.get_submodule(module), attribute, made[id(parameter)])


def _all_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return root.named_parameters(remove_duplicate=False)
