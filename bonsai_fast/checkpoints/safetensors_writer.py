"""Write a safetensors file whose tensors come block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch

from bonsai_fast.checkpoints.safetensors_reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: order for order, dtype in enumerate(DTYPES.values())}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write the file that `safetensors.torch.save_file` would, without holding a tensor.

    Args:
        path: of the new file.
        tensors: shapes and dtypes by name; on the meta device will do.
        blocks: name -> the tensor's rows, in order, in as many pieces as it likes.
        metadata: of the file.
    Raises:
        OSError: it cannot be written.
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
