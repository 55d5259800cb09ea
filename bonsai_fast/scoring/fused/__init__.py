"""An engine of its own for LLaMA-like decoders."""

from bonsai_fast.scoring.fused.arithmetic.products import Precision
from bonsai_fast.scoring.fused.choose_route import Route
from bonsai_fast.scoring.fused.engine import FusedEngine
from bonsai_fast.scoring.fused.gpu_rates import Rates
from bonsai_fast.scoring.fused.parent import UnsupportedStructureError

__all__ = ["FusedEngine", "Precision", "Rates", "Route", "UnsupportedStructureError"]
