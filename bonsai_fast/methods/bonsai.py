"""Method "bonsai": the published algorithm, or the default that grew out of it."""

from __future__ import annotations

import torch

from bonsai_fast.methods.grouped import GroupedBonsai
from bonsai_fast.methods.paper import PaperBonsai
from bonsai_fast.methods.search import Method, Plan, Search, Task


class Bonsai:
    """Chooses by what the regression estimates: groups of units, or every unit."""

    def plan(self, task: Task) -> Plan:
        """Work that `find` is going to do."""
        return self._variant(task).plan(task)

    def find(self, search: Search) -> torch.Tensor:
        """Which units stay, bool [P]."""
        return self._variant(search.task).find(search)

    def _variant(self, task: Task) -> Method:
        return GroupedBonsai() if task.config.regression == "groups" else PaperBonsai()
