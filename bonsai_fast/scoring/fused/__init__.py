"""An engine of its own for LLaMA-like decoders."""

from bonsai_fast.scoring.fused.engine import FusedEngine
from bonsai_fast.scoring.fused.policy import Route
from bonsai_fast.scoring.fused.products import Precision
from bonsai_fast.scoring.fused.rates import Rates
from bonsai_fast.scoring.fused.structure import UnsupportedStructureError

__all__ = ["FusedEngine", "Precision", "Rates", "Route", "UnsupportedStructureError"]
