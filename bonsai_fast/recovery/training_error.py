"""The error of a training that cannot go on."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A loss is not finite; the message says where, and what to change."""
