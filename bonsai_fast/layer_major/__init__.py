"""Text through a model one decoder layer at a time, so that one at a time need be resident."""

from bonsai_fast.layer_major.inputs import InputRecorder, LinearInputs, Needs, NotFiniteError
from bonsai_fast.layer_major.residence import exchanged, resident
from bonsai_fast.layer_major.sweep import Sweep, sweep_perplexity

__all__ = [
    "InputRecorder",
    "LinearInputs",
    "Needs",
    "NotFiniteError",
    "Sweep",
    "exchanged",
    "resident",
    "sweep_perplexity",
]
