"""The plugin is found by its entry point, and does nothing until vLLM calls it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from bonsai_fast.hub import model_types


def test_the_entry_point_registers_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names that saved configurations carry, as text: nothing of vLLM is imported."""
    known: dict[str, Any] = {}

    class Registry:
        register_model = staticmethod(known.__setitem__)

    vllm = ModuleType("vllm")
    vllm.ModelRegistry = Registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    (entry,) = (
        entry
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry.name == "bonsai_fast"
    )
    entry.load()()
    assert set(known) <= {f"Bonsai{name}" for name in model_types().values()}
    assert "BonsaiLlamaForCausalLM" in known
    (target,) = set(known.values())
    module, _, name = target.partition(":")
    source = importlib.util.find_spec(module).loader.get_source(module)
    assert f"class {name}(" in source
    assert module not in sys.modules
