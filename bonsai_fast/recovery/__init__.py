"""What makes a pruned model better again, with its parent as the teacher."""

from bonsai_fast.recovery.recovery_task import (
    RecoveryPlan,
    RecoveryTask,
    TextWanted,
    TierRecord,
    TrainingPoint,
)
from bonsai_fast.recovery.tier import RecoveryTier
from bonsai_fast.recovery.training_error import TrainingError

__all__ = [
    "RecoveryPlan",
    "RecoveryTask",
    "RecoveryTier",
    "TextWanted",
    "TierRecord",
    "TrainingError",
    "TrainingPoint",
]
