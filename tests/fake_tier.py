"""A recovery tier whose result is known: it multiplies the down projections by a factor."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import stream_of, weight
from bonsai_fast.config.choices import Tier
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.models import find_decoder
from bonsai_fast.recovery import (
    RecoveryPlan,
    RecoveryTask,
    TextWanted,
    TierRecord,
    TrainingPoint,
    tiers,
)
from bonsai_fast.runs.layer_record import LayerRecord


@dataclass
class Scale:
    """Multiplies down projections; `tasks` remembers what it was run on."""

    name: Tier
    factor: float = 2.0
    wanted: TextWanted | None = None
    disk_bytes: int = 0
    refuses: str = ""
    refuses_cut: str = ""
    dies: bool = False
    tasks: list[RecoveryTask] = field(default_factory=list)

    def text(self, options: RecoverOptions) -> TextWanted | None:
        tokens = options.recover_tokens
        return self.wanted and TextWanted(tokens or self.wanted.tokens, self.wanted.length)

    def check(self, task: RecoveryTask) -> None:
        if self.refuses:
            raise ValueError(self.refuses)
        if self.refuses_cut and task.student is not task.teacher:
            raise ValueError(self.refuses_cut)

    def plan(self, task: RecoveryTask) -> RecoveryPlan:
        return RecoveryPlan(task.text.input_ids.numel(), self.disk_bytes)

    @torch.no_grad()
    def run(self, task: RecoveryTask) -> TierRecord:
        self.tasks.append(task)
        streamed = stream_of(task.student) is not None
        for number, name in enumerate(scaled(task.student)):
            changed = weight(task.student, name) * self.factor
            if streamed:
                LayerRecord(task.folder / "layers").save(number, {name: changed})
            else:
                task.student.get_parameter(name).copy_(changed)
            if self.dies and number:
                raise KeyboardInterrupt
        curve = [TrainingPoint(64, 2.5, 2.25), TrainingPoint(128, 2.0, None)]
        return TierRecord(
            self.name,
            task.text.input_ids.numel(),
            0.5,
            held_out_before=2.5,
            held_out_after=2.25,
            curve=curve,
            settings={"factor": self.factor},
            notes=["every weight was scaled"],
        )


def scaled(model: PreTrainedModel) -> list[str]:
    """The weights that it changes, one in each layer."""
    decoder = find_decoder(model)
    names = (f"{decoder.path}.{n}.mlp.down_proj.weight" for n in range(decoder.num_layers))
    return list(names)


def install(monkeypatch: pytest.MonkeyPatch, *fakes: Scale) -> None:
    """Make these the only tiers that there are."""
    makers = {tier.name: (lambda tier=tier: tier) for tier in fakes}
    monkeypatch.setattr(tiers, "TIERS", makers)
