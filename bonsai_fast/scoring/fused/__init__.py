"""The engine for decoders whose layers it can read, which computes once what sub-models share."""

from bonsai_fast.scoring.fused.engine import FusedEngine
from bonsai_fast.scoring.fused.parent import UnsupportedStructureError

__all__ = ["FusedEngine", "UnsupportedStructureError"]
