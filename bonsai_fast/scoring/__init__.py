"""Scoring sub-models: keep masks in, losses out."""

from bonsai_fast.scoring.fused import Precision
from bonsai_fast.scoring.hooks_engine import masked
from bonsai_fast.scoring.scorer import EngineName, MaskScorer
from bonsai_fast.scoring.sequence_nll import ParentReference, SequenceNLL

__all__ = [
    "EngineName",
    "MaskScorer",
    "ParentReference",
    "Precision",
    "SequenceNLL",
    "masked",
]
