"""What the tests of GGUF files share: reading one, and writing one of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from export_cases import save_dense, save_pruned

from bonsai_fast.export import to_gguf


class Read:
    """A file's metadata and tensors, in PyTorch's order of dimensions."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.architecture = self.fields["general.architecture"]
        self.tensors = {
            tensor.name: torch.from_numpy(
                gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
            ).reshape([int(size) for size in reversed(tensor.shape)])
            for tensor in reader.tensors
        }

    def layers(self, key: str, count: int) -> list[int]:
        value = self.fields[f"{self.architecture}.{key}"]
        return value if isinstance(value, list) else [value] * count


def exported(tmp_path: Path, family: str, case: str = "widths", **options: Any) -> Read:
    save_pruned(tmp_path / "model", family, case)
    to_gguf(tmp_path / "model", tmp_path / "model.gguf", **{"precision": "f32", **options})
    return Read(tmp_path / "model.gguf")


def dense_file(directory: Path, family: str, precision: Any = "f32") -> Path:
    """The parent of `save_pruned`'s models as GGUF."""
    save_dense(directory, family)
    path = directory.with_suffix(".gguf")
    to_gguf(directory, path, precision=precision)
    return path
