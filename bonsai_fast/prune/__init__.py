"""Prune a model, save the result and compare it with its parent."""

from bonsai_fast.prune.job import prune

__all__ = ["prune"]
