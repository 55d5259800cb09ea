"""An engine of its own for LLaMA-like decoders."""

from bonsai_fast.config.choices import Precision
from bonsai_fast.scoring.fused.engine import FusedEngine
from bonsai_fast.scoring.fused.parent import UnsupportedStructureError

__all__ = ["FusedEngine", "Precision", "UnsupportedStructureError"]
