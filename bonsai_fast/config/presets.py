"""A preset: what a method reads, and how much text, unless it is told otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from bonsai_fast.config.options import MethodOptions

O_co = TypeVar("O_co", bound=MethodOptions, covariant=True)


@dataclass(frozen=True)
class Preset(Generic[O_co]):
    """Values for everything that the user leaves out.

    Attributes:
        options: of the method.
        num_sequences: calibration sequences.
        sequence_length: tokens in each of them; None: the longest window that the model takes.
    """

    options: O_co
    num_sequences: int = 64
    sequence_length: int | None = 256
