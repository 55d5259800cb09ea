"""An interrupted training on disk: parameters, state of the optimiser, and how far it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bonsai_fast.recovery.recovery_task import TrainingPoint

STATE = "training-state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class Progress:
    """How far a training is.

    Attributes:
        steps: made.
        sequences: read, counted over all epochs.
        seconds: of all starts, until the state was saved.
        held_out_before: loss before the first step, nats per token.
        lowest: the lowest loss on held-out text.
        worse: number of measurements since then.
        best: that loss of the parameters that are kept, the latest of those that are as good as
            the lowest but for noise.
        best_step: after how many steps it was measured.
        milestones: number of measurements.
        loss_sum, loss_steps: training loss since the last point of the curve.
        is_finished: whether there is nothing left to train.
        stopped: why it ended early, in words; empty if it did not.
        curve: the points so far.
    """

    steps: int = 0
    sequences: int = 0
    seconds: float = 0.0
    held_out_before: float = 0.0
    lowest: float = 0.0
    best: float = 0.0
    best_step: int = 0
    worse: int = 0
    milestones: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    is_finished: bool = False
    stopped: str = ""
    curve: list[TrainingPoint] = field(default_factory=list)


class TrainingFiles:
    """The state of a training in a folder, and its best parameters.

    Args:
        folder: where the files are.
        identity: plain values that a training must share with an earlier start to continue it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder, self._identity = folder, json.loads(json.dumps(dict(identity)))

    def find(self) -> Progress | None:
        """How far an earlier start was; None if there was none.

        Raises:
            ValueError: the folder holds another training, or its state is damaged.
        """
        path = self._folder / STATE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["training"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; delete it to train anew") from error
        for name, value in self._identity.items():
            before = about["identity"].get(name)
            if before != value:
                raise ValueError(
                    f"{self._folder} holds a training with {name}={before}, now it is {value}; "
                    "choose the same, or another directory"
                )
        progress = Progress(**about["progress"])
        progress.curve = [TrainingPoint(**point) for point in about["progress"]["curve"]]
        return progress

    def load(
        self, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
    ) -> None:
        """Give parameters and optimiser the values of the state.

        Args:
            parameters: by name.
            optimiser: AdamW over these parameters.
        """
        saved = load_file(self._folder / STATE)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[f"parameter.{name}"])
                if f"step.{name}" in saved:
                    state = {key: saved[f"{key}.{name}"].to(parameter.device) for key in MOMENTS}
                    optimiser.state[parameter] = {"step": saved[f"step.{name}"], **state}

    def save(
        self,
        progress: Progress,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Write the state, and delete best parameters that it does not name."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for key, value in optimiser.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        about = {"identity": self._identity, "progress": asdict(progress)}
        _write(self._folder / STATE, tensors, {"training": json.dumps(about)})
        for path in self._folder.glob("best-*.safetensors"):
            if path != self._best(progress.best_step):
                path.unlink(missing_ok=True)

    def save_best(self, steps: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep the parameters of a step; those of earlier ones stay until `save`."""
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        _write(self._best(steps), values, {})

    def load_best(self, steps: int) -> dict[str, Tensor]:
        """The parameters of a step."""
        return load_file(self._best(steps))

    def _best(self, steps: int) -> Path:
        return self._folder / f"best-{steps:08d}.safetensors"


def state_bytes(num_parameters: int) -> int:
    """Largest size of the files of a training at one time, bytes: two states, two best ones."""
    return 2 * (3 + 1) * 4 * num_parameters


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise
