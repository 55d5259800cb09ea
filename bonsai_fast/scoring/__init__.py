"""Scoring sub-models: keep masks in, losses out."""

from bonsai_fast.scoring.agreement import PrecisionCheck, check_precision
from bonsai_fast.scoring.fused import Precision
from bonsai_fast.scoring.hooks import masked
from bonsai_fast.scoring.memory import default_budget, parse_bytes
from bonsai_fast.scoring.nll import ParentReference, SequenceNLL
from bonsai_fast.scoring.scorer import EngineName, MaskScorer

__all__ = [
    "EngineName",
    "MaskScorer",
    "ParentReference",
    "Precision",
    "PrecisionCheck",
    "SequenceNLL",
    "check_precision",
    "default_budget",
    "masked",
    "parse_bytes",
]
