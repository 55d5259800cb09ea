"""Does a model fit into memory? Byte strings, budgets, and the memory of devices."""

from __future__ import annotations

import os
import re
from math import prod
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from bonsai_fast.checkpoints.safetensors_reader import open_checkpoint

# the files of a model in safetensors; weights in other formats are not downloaded
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "README.md")
DEFAULT_BUDGET_BYTES = 2 * 2**30
CUDA_FRACTION = 0.5
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def local_directory(name: str, *, download: bool) -> Path:
    """The directory of a model, by its path or hub name.

    Args:
        name: path or hub name.
        download: download the model if it is not in the hub's cache.
    Raises:
        ValueError: there is no such model, or it is not in the cache and may not be downloaded.
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
        dtype: of the loaded model; as stored if None.
    Raises:
        ValueError, SafetensorError: the model is damaged or in another format.
    """
    return sum(
        prod(tensor.shape) * (dtype or tensor.dtype).itemsize
        for tensor in open_checkpoint(directory).tensors.values()
    )


def device_memory(device: torch.device) -> int:
    """Memory of a device in bytes; for the CPU, the machine's or this process's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def parse_bytes(text: str | int) -> int:
    """Bytes in "800MB", "2GiB" or a plain number.

    Raises:
        ValueError: not a positive amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", str(text).upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"memory: expected an amount such as 800MB or 2GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def default_budget(device: torch.device) -> int:
    """Default memory budget of scoring in bytes, beside the weights; the same on every run."""
    if device.type == "cuda":
        return int(CUDA_FRACTION * torch.cuda.get_device_properties(device).total_memory)
    return DEFAULT_BUDGET_BYTES
