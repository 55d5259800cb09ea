"""Text through a model one decoder layer at a time, so that one at a time need be resident."""

from bonsai_fast.layer_major.inputs import InputRecorder, LinearInputs, Needs, UnusableInputsError
from bonsai_fast.layer_major.residence import exchanged, resident
from bonsai_fast.layer_major.sweep import Sweep, check_memory, sweep_perplexity

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
