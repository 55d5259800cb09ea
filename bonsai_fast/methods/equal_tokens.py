"""Methods that search, at an equal number of forward tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bonsai_fast.config import PruneConfig
from bonsai_fast.methods.method import Method
from bonsai_fast.methods.task import Task

# what a method can do more or less of; the others do what they do
KNOBS = {"policy-gradient": "rounds", "mini-llm": "directions", "bonsai": "submodels_per_round"}


def within_tokens(method: Method, task: Task, tokens: int) -> PruneConfig:
    """The configuration with which a method comes nearest to this many forward tokens from below.

    At least one step is taken, whatever it costs. Bonsai's default has a fixed programme, and one-
    shot methods have none.
    """
    config = task.config
    knob = KNOBS.get(config.method)
    if knob is None or (config.method == "bonsai" and config.regression == "groups"):
        return config

    def turned(value: int) -> PruneConfig:
        changes: dict[str, Any] = {knob: value}
        return replace(config, **changes)

    def cost(value: int) -> int:
        return method.plan(replace(task, config=turned(value))).tokens

    # every plan is so many tokens at the start and so many for each step
    step = cost(2) - cost(1)
    return turned(max(1, 1 + (tokens - cost(1)) // step))
