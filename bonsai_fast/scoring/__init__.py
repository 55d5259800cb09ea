"""Scoring sub-models: keep masks in, losses out."""

from bonsai_fast.config.choices import EngineName, Precision
from bonsai_fast.scoring.expert_calls import ExpertCall, experts_watched
from bonsai_fast.scoring.hooks_engine import masked
from bonsai_fast.scoring.output_weights import OutputProjection, OutputWeights
from bonsai_fast.scoring.scorer import MaskScorer
from bonsai_fast.scoring.scoring_session import Chunk, ScoringSession
from bonsai_fast.scoring.sequence_nll import SequenceNLL

__all__ = [
    "Chunk",
    "EngineName",
    "ExpertCall",
    "MaskScorer",
    "OutputProjection",
    "OutputWeights",
    "Precision",
    "ScoringSession",
    "SequenceNLL",
    "experts_watched",
    "masked",
]
