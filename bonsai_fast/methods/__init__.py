"""Pruning methods of two kinds: which units stay (METHODS), which weights (WEIGHT_METHODS)."""

from bonsai_fast.methods.configure import configure, resolve
from bonsai_fast.methods.method import Compensates, Method
from bonsai_fast.methods.registry import EXPERT_METHODS, METHODS, WEIGHT_METHODS
from bonsai_fast.methods.session import NotRecordedError, Search
from bonsai_fast.methods.task import Plan, Task
from bonsai_fast.methods.weights.weight_method import Choice, WeightMethod

__all__ = [
    "EXPERT_METHODS",
    "METHODS",
    "WEIGHT_METHODS",
    "Choice",
    "Compensates",
    "Method",
    "NotRecordedError",
    "Plan",
    "Search",
    "Task",
    "WeightMethod",
    "configure",
    "resolve",
]
