"""Text through a model one decoder layer at a time, so that one at a time need be resident."""

from bonsai_fast.methods.weights.linear_inputs import (
    InputRecorder,
    LinearInputs,
    Needs,
    UnusableInputsError,
)
from bonsai_fast.methods.weights.residence import exchanged, resident
from bonsai_fast.methods.weights.sweep import Sweep, check_memory, sweep_perplexity

__all__ = [
    "InputRecorder",
    "LinearInputs",
    "Needs",
    "Sweep",
    "UnusableInputsError",
    "check_memory",
    "exchanged",
    "resident",
    "sweep_perplexity",
]
