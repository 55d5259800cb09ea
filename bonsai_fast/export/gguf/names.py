"""A saved model's tensors under llama.cpp's names, read one at a time."""

from __future__ import annotations

import math
import re

import gguf
import torch

from bonsai_fast.checkpoints.saved_model import SavedModel
from bonsai_fast.export.gguf.architecture import ROTATES_PAIRS, rope_of
from bonsai_fast.export.gguf.multipliers import multipliers_of

# The block that has every tensor of those written here: SwiGLU, with norms of q and k.
BLOCK = gguf.MODEL_ARCH.QWEN3
SUFFIXES = (".weight", ".bias")
# Phi-3's fused projections, which llama.cpp names otherwise: their parts, in order
FUSED = {
    "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
}
ROPE_FACTORS = "rope_freqs.weight"


class SavedTensors:
    """`TensorSource` over a model directory."""

    def __init__(self, model: SavedModel) -> None:
        self.model = model
        self.head_dim = model.head_dim
        self.rotates_pairs = model.family in ROTATES_PAIRS
        self.hidden_size = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)
        self.has_head_norms = model.family == "qwen3"
        self._stored, self._unnamed = _stored(model)
        self._multipliers = multipliers_of(model.family, model.config, model.head_dim)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        if name == ROPE_FACTORS:
            return bool(rope_of(self.model.config)["rope_type"] == "llama3")
        if name == "output.weight" and self.model.is_tied:
            return False
        return name in self._stored

    def get(self, name: str) -> torch.Tensor:
        """The tensor, with the model's multipliers."""
        if name == ROPE_FACTORS:
            return rope_factors(self.model)
        return self._multipliers.applied(name, self._plain(name))

    def _plain(self, name: str) -> torch.Tensor:
        stored, part = self._stored[name]
        tensor = self.model.tensor(stored)
        if part is None:
            return tensor
        shape = self.model.shapes[int(name.split(".")[1])]
        query, key = shape.num_heads * self.head_dim, shape.num_kv_heads * self.head_dim
        sizes = [query, key, key] if ".attn_" in name else [shape.channels] * 2
        found: torch.Tensor = tensor.split(sizes)[part]
        return found

    def check_complete(self) -> None:
        """Make sure that nothing of the model would be left out.

        Raises:
            ValueError: the directory holds a tensor that has no name in llama.cpp.
        """
        if self._unnamed:
            raise ValueError(
                f"{self.model.directory} holds {self._unnamed[0]}, which GGUF has no name for"
            )


def tensor_names(num_layers: int) -> list[str]:
    """Every name that a weight or bias of such a model may have."""
    patterns = [
        gguf.TENSOR_NAMES[kind] + end for kind in gguf.MODEL_TENSORS[BLOCK] for end in SUFFIXES
    ]
    names = [name.format(bid=layer) for layer in range(num_layers) for name in patterns]
    return [name for name in dict.fromkeys(names) if name != ROPE_FACTORS]


def _stored(model: SavedModel) -> tuple[dict[str, tuple[str, int | None]], list[str]]:
    """llama.cpp's name -> stored name, and which part of a fused tensor; then those without one."""
    known = gguf.get_tensor_name_map(BLOCK, len(model.shapes))
    found: dict[str, tuple[str, int | None]] = {}
    unnamed = []
    for name in model.files:
        fused = re.fullmatch(r"model\.layers\.(\d+)\.(\w+\.\w+)(\.weight|\.bias)", name)
        if fused and fused[2] in FUSED:
            for part, role in enumerate(FUSED[fused[2]]):
                found[f"blk.{fused[1]}.{role}{fused[3]}"] = (name, part)
            continue
        own = known.get_name(name, SUFFIXES)
        if own is None or own in found or not own.endswith(SUFFIXES):
            unnamed.append(name)
        else:
            found[own] = (name, None)
    return found, unnamed


def rope_factors(model: SavedModel) -> torch.Tensor:
    """What LLaMA 3's rotary embedding divides its frequencies by: float32 [K / 2].

    `factor` at long wavelengths, 1 at short ones, in between at those in between.
    """
    rope = rope_of(model.config)
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()
