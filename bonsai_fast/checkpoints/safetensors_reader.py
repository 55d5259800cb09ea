"""Tensors in memory-mapped safetensors files, read one block at a time.

`safetensors.safe_open(...).get_slice` gives the same views, but its pages stay resident while the
file is open: reading a file raises the peak memory by its whole size, here by one block.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

# names in safetensors; its writer sorts tensors by the reverse of this order
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        file: the mapped bytes of the file.
        dtype: of its elements.
        shape: its sizes.
        start: offset of its bytes in the file.
    """

    file: mmap.mmap
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def blocks(self, max_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Its rows in order, as pairs of (number of the first row, view of some rows).

        A view has as many rows as fit into `max_bytes`, but at least one. It is valid until the
        next one is requested: its pages are then released, so files larger than memory can be read.
        """
        if self.num_bytes == 0:
            yield 0, torch.empty(self.shape, dtype=self.dtype)
            return
        rows = self.shape[0] if self.shape else 1
        step = max(1, max_bytes // (self.num_bytes // rows))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            block, start, stop = self._rows(first, count)
            yield first, block if self.shape else block.view(())
            _give_back(self.file, start, stop)

    def row(self, index: int, max_bytes: int) -> torch.Tensor:
        """One index of the first dimension: a copy, whose pages are released."""
        block, start, stop = self._rows(index, 1)
        found = block[0].clone()
        _give_back(self.file, start, stop)
        return found

    def _rows(self, first: int, count: int) -> tuple[torch.Tensor, int, int]:
        """A view of some rows, and where their bytes are."""
        row_bytes = self.num_bytes // (self.shape[0] if self.shape else 1)
        start = self.start + first * row_bytes
        flat = torch.frombuffer(
            self.file,
            dtype=self.dtype,
            count=count * (row_bytes // self.dtype.itemsize),
            offset=start,
        )
        return flat.view(count, *self.shape[1:]), start, start + count * row_bytes

    def mapped(self) -> torch.Tensor:
        """A view of the whole tensor in the file; the operating system reads pages on use."""
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        count = prod(self.shape)
        flat = torch.frombuffer(self.file, dtype=self.dtype, count=count, offset=self.start)
        return flat.view(self.shape)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All tensors of a directory, by name, in the order of its files.

    Attributes:
        tensors: by the name in the files.
        metadata: of all files, merged.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Map the safetensors files of a model's directory.

    Raises:
        ValueError: there are none, one is missing, or a dtype is unknown to PyTorch.
        SafetensorError: a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for path in _weight_files(directory):
        with safe_open(path, framework="pt") as checked:  # refuses what is damaged
            names = list(checked.keys())
            for key, value in (checked.metadata() or {}).items():
                metadata.setdefault(key, value)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            # private pages: PyTorch needs writable memory, but nothing writes to it
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name in names:
            entry = header[name]
            if (dtype := DTYPES.get(entry["dtype"])) is None:
                raise ValueError(
                    f"{path}: {name} has dtype {entry['dtype']}, which PyTorch does not have"
                )
            start = 8 + length + entry["data_offsets"][0]
            tensors[name] = StoredTensor(mapped, dtype, tuple(entry["shape"]), start)
    return Checkpoint(tensors, metadata)


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers would load from."""
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return [directory / SAFE_WEIGHTS_NAME]
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise ValueError(
            f"{directory}: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}; weights in "
            "another format must be loaded and saved as safetensors first"
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory}: {missing[0]} is missing, which {index.name} names")
    return [directory / name for name in names]


def _give_back(file: mmap.mmap, start: int, stop: int) -> None:
    """Release the pages that are entirely inside [start, stop)."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            file.madvise(mmap.MADV_DONTNEED, first, last - first)
