"""Method "bonsai": the published algorithm, or the default that was developed from it."""

from __future__ import annotations

import torch

from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.bonsai_default import GroupedBonsai
from bonsai_fast.methods.units.bonsai_options import BONSAI_PRESETS, BonsaiOptions
from bonsai_fast.methods.units.bonsai_paper import PaperBonsai


class Bonsai:
    """Chooses the variant by what the regression estimates: groups of units, or every unit."""

    presets = BONSAI_PRESETS

    def plan(self, task: Task[BonsaiOptions]) -> Plan:
        """Work that `find` will do."""
        return self._variant(task).plan(task)

    def find(self, search: Search[BonsaiOptions]) -> torch.Tensor:
        """The units to keep, bool [P]."""
        return self._variant(search.task).find(search)

    def _variant(self, task: Task[BonsaiOptions]) -> GroupedBonsai | PaperBonsai:
        return GroupedBonsai() if task.options.regression == "groups" else PaperBonsai()
