"""Names of model families."""

from __future__ import annotations

PREFIX = "bonsai_"


def family_of(model_type: str) -> str:
    """Name of the parent's family: a pruned `bonsai_llama` is a `llama`."""
    return model_type.removeprefix(PREFIX)
