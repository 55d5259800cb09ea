"""Test environment: offline, few threads, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tensors are tiny: a second thread only waits. NumPy reads this when torch imports it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from once import made_once

torch.set_num_threads(1)
# Triton reads this when a kernel is defined, so it must precede every import of bonsai_fast.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with NumPy, which warns of infinities that tests put in on purpose.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def interpreter_is_broken() -> bool:
    """Triton 3.6.0 makes Python numbers of one-element arrays, which NumPy 2.4 refuses."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return False
    numpy = tuple(int(part) for part in metadata.version("numpy").split(".")[:2])
    return triton == "3.6.0" and numpy >= (2, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    # Workers take files in this order: none of them is left alone with a slow one at the end.
    items.sort(key=lambda item: item.path not in slow_files)
    if torch.cuda.is_available():
        return
    skips = {"gpu": pytest.mark.skip(reason="needs a CUDA device")}
    if interpreter_is_broken():
        skips["kernel"] = pytest.mark.skip(
            reason="Triton 3.6.0 interprets no loop with a tensor as its bound on NumPy >= 2.4"
        )
    for item in items:
        for marker, skip in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def report_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of runs of every kind; to be copied, not changed."""
    from report_cases import CONFIGS, make_runs

    folder = made_once(tmp_path_factory, "report-runs", make_runs)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory (XDG_CACHE_HOME) in which the embedded model was made."""
    from bonsai_fast.checkpoints.embedded import embedded_model

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            embedded_model()

    return made_once(tmp_path_factory, "embedded", make)


@pytest.fixture(scope="session", autouse=True)
def builtin_text_is_tokenized_once() -> Iterator[None]:
    """A tokenizer gives the same tokens in every run; making them takes longer than a tiny run."""
    module = sys.modules.get("bonsai_fast.evaluation.text")
    if module is None:  # no test needs it
        yield
        return
    tokenize, known = module._tokenize, {}

    def remembered(source, purpose, tokenizer, num_tokens):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if source != "builtin" or backend is None:
            return tokenize(source, purpose, tokenizer, num_tokens)
        if (key := backend.to_str()) not in known:
            known[key] = tokenize(source, purpose, tokenizer, num_tokens)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_tokenize", remembered)
        yield


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN (integers: their minimum), so that its use shows."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).min)
            return tensor

        return wrapper

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
