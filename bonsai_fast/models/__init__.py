"""The prunable structure of a loaded Hugging Face model."""

from bonsai_fast.models.blocks import AttentionBlock, Block, Cut, Decoder, ExpertsBlock, MLPBlock
from bonsai_fast.models.families import family_of
from bonsai_fast.models.find import UnsupportedModelError, find_decoder

__all__ = [
    "AttentionBlock",
    "Block",
    "Cut",
    "Decoder",
    "ExpertsBlock",
    "MLPBlock",
    "UnsupportedModelError",
    "family_of",
    "find_decoder",
]
