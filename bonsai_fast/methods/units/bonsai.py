"""Method "bonsai": the published algorithm, or the default that was developed from it."""

from __future__ import annotations

import torch

from bonsai_fast.methods.session import Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.units.bonsai_compensated import CompensatedBonsai
from bonsai_fast.methods.units.bonsai_default import GroupedBonsai
from bonsai_fast.methods.units.bonsai_options import BONSAI_PRESETS, BonsaiOptions
from bonsai_fast.methods.units.bonsai_paper import PaperBonsai


class Bonsai:
    """Chooses the variant by what is estimated, and whether compensation follows."""

    presets = BONSAI_PRESETS

    def plan(self, task: Task[BonsaiOptions]) -> Plan:
        """Work that `find` will do."""
        return self._variant(task).plan(task)

    def find(self, search: Search[BonsaiOptions]) -> torch.Tensor:
        """The units to keep, bool [P]."""
        return self._variant(search.task).find(search)

    def _variant(
        self, task: Task[BonsaiOptions]
    ) -> CompensatedBonsai | GroupedBonsai | PaperBonsai:
        options = task.options
        if options.regression != "groups":
            return PaperBonsai()
        own_order = options.prior in ("auto", "obs") and options.rounds is None
        own_order &= not task.layout.has_mixtures  # they have no projection to refit
        return CompensatedBonsai() if task.compensates and own_order else GroupedBonsai()
