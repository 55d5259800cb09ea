"""Training a pruned model against its parent: by distillation, and as four papers publish it."""

from bonsai_fast.recovery.distill.distill_tier import DistillTier

__all__ = ["DistillTier"]
