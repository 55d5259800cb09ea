"""Text through a model one decoder layer at a time, and what its linear layers read."""

from bonsai_fast.layerwise.linear_inputs import (
    InputRecorder,
    LinearInputs,
    Needs,
    UnusableInputsError,
)
from bonsai_fast.layerwise.sweep import Sweep, check_memory, sweep_losses

__all__ = [
    "InputRecorder",
    "LinearInputs",
    "Needs",
    "Sweep",
    "UnusableInputsError",
    "check_memory",
    "sweep_losses",
]
