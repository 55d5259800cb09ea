"""The protocol of recovery tiers."""

from __future__ import annotations

from typing import Protocol

from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.recovery.recovery_task import RecoveryPlan, RecoveryTask, TextWanted, TierRecord


class RecoveryTier(Protocol):
    """One way to make a pruned model better again."""

    def text(self, options: RecoverOptions) -> TextWanted | None:
        """Text that `RecoveryTask.text` shall hold; None: the calibration sequences."""

    def check(self, task: RecoveryTask) -> None:
        """Refuse what this tier cannot do, before any work.

        Before a model is pruned, its parent stands in for the student.

        Raises:
            ValueError: one line.
        """

    def plan(self, task: RecoveryTask) -> RecoveryPlan:
        """Work that `run` will do."""

    def run(self, task: RecoveryTask) -> TierRecord:
        """Change the student; an interrupted start of the same task is continued.

        Raises:
            OSError: a file cannot be written.
            TrainingError: a loss is not finite; the message is one line.
        """
