"""Methods that search, at an equal number of forward tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bonsai_fast.methods import Task

# the option by which a method does more or less; the others have none
KNOBS = {"policy-gradient": "rounds", "mini-llm": "directions", "bonsai": "submodels_per_round"}


def within_tokens(task: Task[Any], tokens: int) -> Task[Any]:
    """The task with as many steps as fit into this number of forward tokens.

    At least one step is made, even if it exceeds the number. Bonsai's default and one-shot methods
    have a fixed number of evaluations: their task is returned unchanged.
    """
    config = task.config
    knob = KNOBS.get(config.method)
    if knob is None or knob in config.options.unread():
        return task

    def turned(value: int) -> Task[Any]:
        options = replace(config.options, **{knob: value})
        return replace(task, config=replace(config, options=options))

    def cost(value: int) -> int:
        return task.method.plan(turned(value)).tokens

    # every plan costs a fixed number of tokens at the start, and a fixed number for each step
    step = cost(2) - cost(1)
    if step == 0:  # a search that counts on compensation scores as many plans as there are
        return task
    return turned(max(1, 1 + (tokens - cost(1)) // step))
