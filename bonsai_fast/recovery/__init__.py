"""What makes a pruned model better again, with its parent as the teacher."""

from bonsai_fast.recovery.recovery_task import (
    RecoveryPlan,
    RecoveryTask,
    TextWanted,
    TierRecord,
    TrainingPoint,
)
from bonsai_fast.recovery.tier import RecoveryTier

__all__ = [
    "RecoveryPlan",
    "RecoveryTask",
    "RecoveryTier",
    "TextWanted",
    "TierRecord",
    "TrainingPoint",
]
