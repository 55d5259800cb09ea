"""Output projections refitted in closed form, by forward passes alone."""

from bonsai_fast.recovery.closed_form.compensate import Compensate

__all__ = ["Compensate"]
