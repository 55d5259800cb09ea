"""A dense model's GGUF file, read as the pruned model's tensors.

Whole heads are removed, so the order of rows inside a head does not matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from bonsai_fast.export.gguf.architecture import ARCHITECTURES
from bonsai_fast.export.gguf.write import Field, Fields
from bonsai_fast.hub import LayerShape

# architectures of dense files -> the family of their blocks
PARENTS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PLAIN_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# entries that the new file has its own values for
OWN_KEYS = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.size_label",
)


@dataclass(frozen=True)
class KeptLayer:
    """The query heads and channels of a dense layer that are kept, by number, ascending."""

    heads: tuple[int, ...]
    channels: tuple[int, ...]


_BLOCK = re.compile(r"blk\.(\d+)\.(\w+\.(?:weight|bias))")


class DenseGGUF:
    """A dense model's file, and a `TensorSource` of its kept heads and channels.

    Raises:
        ValueError: not a GGUF file, an architecture that cannot be cut, or quantized weights.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.reader = gguf.GGUFReader(self.path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{self.path} is not readable as GGUF: {error}") from error
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in PARENTS:
            raise ValueError(
                f"{self.path}: expected a dense model of architecture {', '.join(PARENTS)}, got "
                f"{self.architecture!r}; leave out --gguf-parent to export from the model directory"
            )
        if self.value("expert_count", 0):
            raise ValueError(f"{self.path} is a mixture of experts, which cannot be pruned")
        quantized = [t for t in self.reader.tensors if t.tensor_type not in PLAIN_TYPES]
        if quantized:
            raise ValueError(
                f"{self.path} is quantized ({quantized[0].name} is "
                f"{quantized[0].tensor_type.name}): give the dense model as F32, F16 or BF16, "
                "export, and quantize the result; or leave out --gguf-parent to export from the "
                "model directory"
            )
        self.rotates_pairs = ARCHITECTURES[self.architecture].rotates_pairs
        self.has_head_norms = PARENTS[self.architecture] == "qwen3"
        self.hidden_size = int(self.value("embedding_length"))
        self.num_layers = int(self.value("block_count"))
        self.num_heads = int(self.value("attention.head_count"))
        self.num_kv_heads = int(self.value("attention.head_count_kv", self.num_heads))
        self.num_channels = int(self.value("feed_forward_length"))
        derived = self.hidden_size // self.num_heads
        self.head_dim = int(self.value("attention.key_length", derived))
        self.vocab_size = int(self.tensors["token_embd.weight"].shape[1])
        self.kept: Sequence[KeptLayer] = ()

    @property
    def is_tied(self) -> bool:
        """Whether embeddings and LM head are the same tensor."""
        return "output.weight" not in self.tensors

    def value(self, key: str, default: Any = None) -> Any:
        """An entry of the metadata, with or without the architecture's prefix.

        Raises:
            ValueError: there is no such entry and no default.
        """
        full = key if key.startswith("general.") else f"{self.architecture}.{key}"
        field = self.reader.get_field(full)
        if field is None and default is None:
            raise ValueError(f"{self.path} has no entry {full}")
        return default if field is None else field.contents()

    def fields(self, architecture: str) -> Fields:
        """Its metadata for a file of another architecture."""
        found: Fields = {}
        for key, field in self.reader.fields.items():
            if key.startswith("GGUF.") or key in OWN_KEYS:
                continue
            contents = field.contents()
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            if sub_type is not None and not contents:
                continue
            if key.startswith(f"{self.architecture}."):
                key = f"{architecture}.{key.partition('.')[2]}"
            found[key] = Field(contents, field.types[0], sub_type)
        return found

    @property
    def has_output_biases(self) -> bool:
        """Whether removed sub-layers leave a bias."""
        names = ("blk.0.attn_output.bias", "blk.0.ffn_down.bias")
        return any(name in self.tensors for name in names)

    def keep(self, kept: Sequence[KeptLayer]) -> None:
        """Set what `has`, `get` and `shapes` describe.

        Raises:
            ValueError: another number of layers, or heads or channels that do not exist.
        """
        if len(kept) != self.num_layers:
            raise ValueError(
                f"{self.path} is of another model: it has {self.num_layers} layers, the pruned "
                f"model's parent {len(kept)}"
            )
        for index, layer in enumerate(kept):
            for what, found, size in (
                ("query head", layer.heads, self.num_heads),
                ("channel", layer.channels, self.num_channels),
            ):
                if found and not 0 <= min(found) <= max(found) < size:
                    raise ValueError(
                        f"{self.path} is of another model: {what} {max(found)} of layer {index} "
                        f"is kept, but it has {size}"
                    )
        self.kept = kept

    def shapes(self) -> list[LayerShape]:
        """What every layer keeps."""
        return [LayerShape(self._groups(layer), len(layer.channels)) for layer in self.kept]

    def has(self, name: str) -> bool:
        """Whether there is such a tensor and some of it is kept."""
        if name not in self.tensors:
            return False
        found = _BLOCK.fullmatch(name)
        if found is None or found[2].endswith("output.bias") or found[2] == "ffn_down.bias":
            return True
        layer = self.kept[int(found[1])]
        return bool(layer.heads if found[2].startswith("attn") else layer.channels)

    def get(self, name: str) -> torch.Tensor:
        """The kept part of a tensor."""
        tensor = self._whole(name)
        found = _BLOCK.fullmatch(name)
        if found is None:
            return tensor
        layer, role = self.kept[int(found[1])], found[2]
        if role.startswith(("ffn_gate", "ffn_up")):
            return tensor[torch.tensor(layer.channels)]
        if role == "ffn_down.weight":
            return tensor[:, torch.tensor(layer.channels)]
        if role == "attn_output.weight":
            return tensor[:, self._rows(layer.heads)]
        if role.startswith("attn_q."):
            return tensor[self._rows(layer.heads)]
        if role.startswith(("attn_k.", "attn_v.")):
            return tensor[self._rows(self._kv_heads(layer))]
        return tensor

    def _whole(self, name: str) -> torch.Tensor:
        stored = self.tensors[name]
        data = torch.from_numpy(stored.data.copy())
        if stored.tensor_type == GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        return data.reshape([int(size) for size in reversed(stored.shape)])

    def _kv_heads(self, layer: KeptLayer) -> tuple[int, ...]:
        per_kv = self.num_heads // self.num_kv_heads
        return tuple(sorted({head // per_kv for head in layer.heads}))

    def _groups(self, layer: KeptLayer) -> tuple[int, ...]:
        per_kv = self.num_heads // self.num_kv_heads
        readers = [head // per_kv for head in layer.heads]
        return tuple(readers.count(kv) for kv in self._kv_heads(layer))

    def _rows(self, heads: Sequence[int]) -> torch.Tensor:
        starts = torch.tensor(heads).unsqueeze(1) * self.head_dim
        return (starts + torch.arange(self.head_dim)).flatten()
