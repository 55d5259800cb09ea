"""Methods that zero single weights, one decoder layer at a time."""

from bonsai_fast.methods.weights.linear_inputs import (
    InputRecorder,
    LinearInputs,
    Needs,
    UnusableInputsError,
)
from bonsai_fast.methods.weights.sweep import Sweep, check_memory, sweep_perplexity

__all__ = [
    "InputRecorder",
    "LinearInputs",
    "Needs",
    "Sweep",
    "UnusableInputsError",
    "check_memory",
    "sweep_perplexity",
]
