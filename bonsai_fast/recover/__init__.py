"""Recover a saved pruned model, with its parent as the teacher."""

from bonsai_fast.recover.recover_job import recover

__all__ = ["recover"]
