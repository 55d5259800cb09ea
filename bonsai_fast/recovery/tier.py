"""The protocol of recovery tiers."""

from __future__ import annotations

from typing import Protocol

from bonsai_fast.recovery.recovery_task import RecoveryPlan, RecoveryTask, TierRecord


class RecoveryTier(Protocol):
    """One way to make a pruned model better again."""

    def check(self, task: RecoveryTask) -> None:
        """Refuse what this tier cannot do, before any work.

        Raises:
            ValueError: one line.
        """

    def plan(self, task: RecoveryTask) -> RecoveryPlan:
        """Work that `run` will do."""

    def run(self, task: RecoveryTask) -> TierRecord:
        """Change the student; an interrupted start of the same task is continued.

        Raises:
            OSError: a file cannot be written.
        """
