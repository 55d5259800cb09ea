"""Recovery on several processes: one does the work, the others help where a tier trains.

`accelerate launch` and `torchrun` start all of them with the same command line. The main one
prunes, refits, saves and measures. The helpers load the models, wait, take over the weights that
the main one has, and train with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from bonsai_fast.recovery.training_error import TrainingError

# what the main process says in place of the number of a tier
END = -1


def num_processes() -> int:
    """Number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_helper() -> bool:
    """Whether this process only helps."""
    return num_processes() > 1 and int(os.environ.get("RANK", "0")) > 0


def choose_gpu() -> None:
    """Let "cuda" mean another GPU in each of several processes."""
    if num_processes() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def call_helpers(tier: int, student: PreTrainedModel) -> None:
    """Have the helpers, if there are any, run a tier from the weights that a model has now.

    Args:
        tier: its place in the recovery.
        student: in memory.
    """
    if num_processes() > 1:
        _say(tier, student.device)
        _share(student)


@contextmanager
def helpers_until_the_end(device: torch.device) -> Iterator[None]:
    """Tell the helpers, if there are any, when they can leave.

    Args:
        device: of the models.
    """
    try:
        yield
    finally:
        if num_processes() > 1:
            with suppress(RuntimeError):  # they were interrupted, too
                _say(END, device)
            _leave()


def help_out(student: PreTrainedModel, run: Callable[[int], object]) -> None:
    """As a helper, run tiers whenever the main process does.

    Args:
        student: gets the main process's weights before.
        run: runs the tier at a place of the recovery.
    """
    while (tier := _say(END, student.device)) != END:
        _share(student)
        with suppress(TrainingError):  # the main process has the same one, and reports it
            run(tier)
    _leave()


def _say(word: int, device: torch.device) -> int:
    """What the main process says."""
    from bonsai_fast.recovery.distill.processes import Processes

    return int(Processes(device).of_main(word))


def _share(student: PreTrainedModel) -> None:
    """Give all processes the main one's parameters."""
    from accelerate.utils import broadcast

    from bonsai_fast.recovery.distill.processes import Processes

    nn.Module.to(student, Processes(student.device).device)
    with torch.no_grad():
        for parameter in student.parameters():
            broadcast(parameter.data, from_process=0)


def _leave() -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()
