"""The result of an export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exported:
    """A written export.

    Attributes:
        output: the file or directory.
        format: "gguf", "padded" or "decilm".
        kind: llama.cpp's architecture, or the model type.
        size_bytes: of the file, or of the directory's weights.
        notes: limits of the export, for people.
    """

    output: str
    format: str
    kind: str
    size_bytes: int
    notes: tuple[str, ...] = ()
