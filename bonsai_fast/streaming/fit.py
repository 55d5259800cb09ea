"""Whether a saved model fits into memory, and where it lies."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from bonsai_fast.surgery.stored import open_checkpoint

# what a model in safetensors consists of; weights in other formats are left where they are
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def local_directory(name: str, *, download: bool) -> Path:
    """The directory of a model by its path or hub name.

    Args:
        name: of the model.
        download: fetch it from the hub if it is not there yet.
    Raises:
        ValueError: there is no such model, or it is not there yet.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(FILES), local_files_only=not download)
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} cannot be found: {error}") from error


def weight_bytes(directory: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes that a saved model's weights take in memory.

    Args:
        directory: of a model in safetensors.
        dtype: that it is loaded in; as it is stored if None.
    Raises:
        ValueError, SafetensorError: it is damaged or in another format.
    """
    return sum(
        prod(tensor.shape) * (dtype or tensor.dtype).itemsize
        for tensor in open_checkpoint(directory).tensors.values()
    )


def device_memory(device: torch.device) -> int:
    """Bytes of a device's memory; of the machine's, or what this process may have of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
