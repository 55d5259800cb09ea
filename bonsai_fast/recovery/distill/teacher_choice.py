"""Where the parent's hidden states come from in a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bonsai_fast.checkpoints.memory import default_budget, parse_bytes
from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.console import Reporter
from bonsai_fast.models.layout import Layout
from bonsai_fast.recovery.distill.distillation_loss import LogitHead
from bonsai_fast.recovery.distill.processes import Processes
from bonsai_fast.recovery.distill.teacher_states import CachedStates, LiveStates, TeacherStates
from bonsai_fast.recovery.distill.training_plan import TrainingPlan
from bonsai_fast.scoring import SequenceNLL
from bonsai_fast.scoring.working_set import rows_within


@contextmanager
def open_teacher(
    plan: TrainingPlan, processes: Processes, reporter: Reporter
) -> Iterator[tuple[TeacherStates | None, LogitHead | None]]:
    """The parent's states and its head; both None for a loss that does not need them.

    A cache is filled first; inside, a parent that was on a GPU is then in the host's memory.

    Raises:
        ValueError: the memory budget does not hold one sequence of a streamed parent.
        OSError: the disk has no room.
    """
    if not plan.recipe.terms.need_parent:
        yield None, None
        return
    task = plan.task
    nll = SequenceNLL(task.teacher)
    head = LogitHead.of(nll).frozen(task.student.device)
    input_ids = task.text.input_ids
    rows = _rows_at_once(nll, plan.length, task.memory_budget)
    live = LiveStates(nll, input_ids, rows=rows)
    if not plan.is_cached:
        yield live, head
        return
    cache = CachedStates(
        task.folder,
        (*input_ids.shape, head.weight.shape[1]),
        task.teacher.dtype,
        identity={"text": task.text.sha256, "parent": task.teacher.config.name_or_path},
        device=task.student.device,
        processes=processes,
    )
    with reporter.bar("parent's hidden states", cache.share) as advance:
        cache.fill(live, rows=rows, advance=advance)
    with _off_the_gpu(nll):
        yield cache, head


def _rows_at_once(nll: SequenceNLL, length: int, memory_budget: int | str | None) -> int:
    """Sequences that the parent is run on at once: 1, or of a streamed one as many as fit."""
    model = nll.model
    if stream_of(model) is None:
        return 1
    budget = default_budget(model.device) if memory_budget is None else parse_bytes(memory_budget)
    return rows_within(budget, Layout.of(model), nll, length)


@contextmanager
def _off_the_gpu(nll: SequenceNLL) -> Iterator[None]:
    """Inside, a parent that is in a GPU's memory is in the host's."""
    model: nn.Module = nll.model
    device = nll.model.device
    if device.type != "cuda" or stream_of(nll.model) is not None:
        yield
        return
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)
