"""Test environment: offline, few threads, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest
import torch

# Triton reads this when a kernel is defined, so it must precede every import of bonsai_fast.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tiny tensors: a second thread only waits
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


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
    from report_cases import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"))


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
