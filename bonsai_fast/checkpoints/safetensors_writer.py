"""Write safetensors files, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from bonsai_fast.checkpoints.safetensors_reader import DTYPES

# the default of transformers' save_pretrained
MAX_SHARD_SIZE = "50GB"
Blocks = Callable[[str], Iterable[torch.Tensor]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: order for order, dtype in enumerate(DTYPES.values())}


def write_model_weights(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Blocks,
    *,
    num_parameters: int,
    metadata: Mapping[str, str],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write the weight files of a model, and their index, as `save_pretrained` would.

    Args:
        directory: where to; it exists.
        tensors, blocks: as in `write_safetensors`, in the order in which the model has them.
        num_parameters: of the model, for the index.
        metadata: of each file.
        max_shard_size: largest file, such as "5GB"; a larger tensor gets its own.
    Raises:
        OSError: a file cannot be written.
    """
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(
            directory / file, {name: tensors[name] for name in names}, blocks, metadata
        )
    if split.is_sharded:
        about = {"total_parameters": num_parameters, **split.metadata}
        index = {"metadata": about, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Blocks,
    metadata: Mapping[str, str],
) -> None:
    """Write the same bytes as `safetensors.torch.save_file`, without holding a whole tensor.

    Args:
        path: of the new file.
        tensors: shapes and dtypes by name; may be on the meta device.
        blocks: name -> the tensor's rows on the CPU, in order, in one or more pieces.
        metadata: of the file.
    Raises:
        OSError: the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name.encode()))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        tensor = tensors[name]
        stop = offset + prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            written = 0
            for block in blocks(name):
                assert block.dtype == tensors[name].dtype, name
                data = block.contiguous().flatten().view(torch.uint8)
                file.write(data.numpy().data)
                written += len(data)
            assert written == tensors[name].nbytes, name
