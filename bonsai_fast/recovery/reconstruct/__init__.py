"""Recovery that trains one decoder layer at a time to give its parent's residual."""

from bonsai_fast.recovery.reconstruct.reconstruct_tier import Reconstruct

__all__ = ["Reconstruct"]
