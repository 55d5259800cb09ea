"""Scoring sub-models: keep masks in, losses out."""

from bonsai_fast.scoring.memory import parse_bytes
from bonsai_fast.scoring.nll import ParentReference, SequenceNLL
from bonsai_fast.scoring.scorer import EngineName, MaskScorer

__all__ = ["EngineName", "MaskScorer", "ParentReference", "SequenceNLL", "parse_bytes"]
