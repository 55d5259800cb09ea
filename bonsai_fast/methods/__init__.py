"""Pruning methods: each finds which units stay, over the same shared parts."""

from bonsai_fast.methods.bonsai import Bonsai
from bonsai_fast.methods.search import Method, NotRecordedError, Plan, Search, Task

METHODS: dict[str, Method] = {"bonsai": Bonsai()}

__all__ = ["METHODS", "Method", "NotRecordedError", "Plan", "Search", "Task"]
