"""A saved model's tensors under llama.cpp's names, read one at a time."""

from __future__ import annotations

import math
import re

import torch

from bonsai_fast.checkpoints.saved_model import SavedModel
from bonsai_fast.export.gguf.architecture import rope_of

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# where Phi-3 keeps them: the fused projection, and which of its parts
FUSED = {
    "attn_q": ("self_attn.qkv_proj", 0),
    "attn_k": ("self_attn.qkv_proj", 1),
    "attn_v": ("self_attn.qkv_proj", 2),
    "ffn_gate": ("mlp.gate_up_proj", 0),
    "ffn_up": ("mlp.gate_up_proj", 1),
}
ROPE_FACTORS = "rope_freqs.weight"


class SavedTensors:
    """`TensorSource` over a model directory."""

    rotates_pairs = False

    def __init__(self, model: SavedModel) -> None:
        self.model = model
        self.head_dim = model.head_dim
        self.hidden_size = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)
        self.has_head_norms = model.family == "qwen3"

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        if name == ROPE_FACTORS:
            return bool(rope_of(self.model.config)["rope_type"] == "llama3")
        if name == "output.weight" and self.model.is_tied:
            return False
        return self._stored(name)[0] in self.model.files

    def get(self, name: str) -> torch.Tensor:
        """The tensor, as it is stored."""
        if name == ROPE_FACTORS:
            return rope_factors(self.model)
        stored, sizes, part = self._stored(name)
        tensor = self.model.tensor(stored)
        return tensor if part is None else tensor.split(sizes)[part]

    def check_complete(self) -> None:
        """Make sure that nothing of the model would be left out.

        Raises:
            ValueError: the directory holds a tensor that has no name in llama.cpp.
        """
        roles = (*BLOCK.values(), *(path for path, _ in FUSED.values()))
        known = re.compile(rf"model\.layers\.\d+\.({'|'.join(map(re.escape, roles))})\.\w+")
        for name in self.model.files:
            if name not in TOP.values() and not known.fullmatch(name):
                raise ValueError(f"{self.model.directory} holds {name}, which GGUF has no name for")

    def _stored(self, name: str) -> tuple[str, list[int], int | None]:
        """Name in the directory; of a fused tensor also the rows of its parts, and which it is."""
        if name in TOP:
            return TOP[name], [], None
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        assert found is not None, name
        layer, role, kind = int(found[1]), found[2], found[3]
        prefix = f"model.layers.{layer}"
        if self.model.family != "phi3" or role not in FUSED:
            return f"{prefix}.{BLOCK[role]}.{kind}", [], None
        shape = self.model.shapes[layer]
        query, key = shape.num_heads * self.head_dim, shape.num_kv_heads * self.head_dim
        sizes = [query, key, key] if role.startswith("attn") else [shape.channels] * 2
        path, part = FUSED[role]
        return f"{prefix}.{path}.{kind}", sizes, part


def rope_factors(model: SavedModel) -> torch.Tensor:
    """By what LLaMA 3 divides the frequencies of its rotary embedding: float32 [K / 2].

    Long wavelengths are divided by `factor`, short ones by 1, those between by something between.
    """
    rope = rope_of(model.config)
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()
