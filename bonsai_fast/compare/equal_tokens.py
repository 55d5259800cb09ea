"""Methods that search, at an equal number of forward tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bonsai_fast.config import ResolvedConfig
from bonsai_fast.methods import Method, Task

# the option by which a method does more or less; the others have none
KNOBS = {"policy-gradient": "rounds", "mini-llm": "directions", "bonsai": "submodels_per_round"}


def within_tokens(method: Method[Any], task: Task[Any], tokens: int) -> ResolvedConfig[Any]:
    """The configuration with which a method comes nearest to this many forward tokens from below.

    At least one step is taken, whatever it costs. The number of evaluations is fixed for Bonsai's
    default and for one-shot methods: they keep their configuration.
    """
    config = task.config
    knob = KNOBS.get(config.method)
    if knob is None or knob in config.options.unread():
        return config

    def turned(value: int) -> ResolvedConfig[Any]:
        return replace(config, options=replace(config.options, **{knob: value}))

    def cost(value: int) -> int:
        return method.plan(replace(task, config=turned(value))).tokens

    # every plan costs a fixed number of tokens at the start, and a fixed number for each step
    step = cost(2) - cost(1)
    return turned(max(1, 1 + (tokens - cost(1)) // step))
