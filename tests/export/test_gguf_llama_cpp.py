"""GGUF files run in llama.cpp itself and say what the pruned model says.

The removed sub-layers are those where llama.cpp would abort, refuse, or silently leave something
out if they were written as they are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from export_cases import CASES, GGUF_FAMILIES, LLAMA_LIKE, save_biased, save_dense, save_pruned

from bonsai_fast.export import check_llama_cpp, reference_of, to_gguf

pytest.importorskip("xllamacpp")

FLOAT32 = 1e-5
PAIRS = [
    *(("llama3", case) for case in CASES),
    *(("qwen3", case) for case in ("attention of layer 0", "mlp of layer 2", "everything")),
    *((family, "widths") for family in GGUF_FAMILIES if family != "llama3"),
    *(("llama_bias", case) for case in ("layer 0", "layer 2", "everything")),
]


@pytest.mark.parametrize("family, case", PAIRS)
def test_the_file_computes_the_model(family: str, case: str, tmp_path: Path) -> None:
    save_pruned(tmp_path / "model", family, case)
    runs(tmp_path)


@pytest.mark.parametrize("family, case", [("qwen2", "widths"), ("llama3", "layer 1")])
def test_biases_that_pruning_adds(family: str, case: str, tmp_path: Path) -> None:
    save_biased(tmp_path / "model", family, case)
    runs(tmp_path)


@pytest.mark.parametrize("family", ["llama_bias", "qwen2", "qwen3", *LLAMA_LIKE])
def test_uniform_models_run_as_their_parents_do(family: str, tmp_path: Path) -> None:
    save_dense(tmp_path / "model", family)
    runs(tmp_path)


def runs(tmp_path: Path) -> None:
    """Export what lies in `model`, run it, and compare."""
    reference = reference_of(tmp_path / "model")
    to_gguf(tmp_path / "model", tmp_path / "model.gguf", precision="f32")
    found = check_llama_cpp(tmp_path / "model.gguf", reference, tolerance=FLOAT32)
    assert found.greedy_equal == found.greedy_tokens == 48
    assert found.tokenizer == "same"
