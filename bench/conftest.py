"""Environment of all benches: the machine in every record, and traffic as a share of the peak.

`pytest bench` times everything; `pytest bench --benchmark-disable -k smoke` runs every benchmark
once on a small shape, untimed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import metadata

import pytest
import torch
from machine import machine_name

from bonsai_fast.testing.cases import synchronized_timer

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

PACKAGES = ("torch", "triton", "transformers", "numpy")
# Larger than any last-level cache.
STREAM_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
# Not timed for single operations on a CPU: smaller shapes show the same.
GPU_SHAPES = ("Phi-2", "Llama-3-8B")
# Rows and columns of a matrix product that reaches the peak.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
# With --benchmark-disable no rate is kept, so that the peaks are measured on small tensors.
UNTIMED_BYTES, UNTIMED_GEMM_SIZE = 1 << 20, 128

Cells = dict[str, dict[str, dict[str, str]]]  # table -> row -> column -> text
_CELLS = pytest.StashKey[Cells]()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add what pytest-benchmark does not record: it records the CPU and the commit."""
    machine_info["node"] = machine_info["machine_name"] = machine_name()  # no host's name
    machine_info.pop("release", None)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = {name: _version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        machine_info["driver"] = subprocess.check_output(query, text=True).strip()


def pytest_benchmark_update_commit_info(commit_info: dict) -> None:
    commit_info.pop("project", None)  # the folder's name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    # bench_latency.py skips models that do not fit
    left_out = [
        item
        for item in items
        if item.path.name != "bench_latency.py" and any(name in item.name for name in GPU_SHAPES)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def repeats(device: torch.device) -> dict[str, int]:
    """Arguments of `benchmark.pedantic`; a GPU is synchronised once per 10 iterations."""
    if device.type == "cuda":
        return {"rounds": 20, "iterations": 10, "warmup_rounds": 3}
    return {"rounds": 5, "iterations": 1, "warmup_rounds": 1}


@pytest.fixture(scope="session")
def timed(pytestconfig: pytest.Config) -> bool:
    return not pytestconfig.getoption("benchmark_disable")


@pytest.fixture(scope="session")
def stream_gb_per_s(device: torch.device, timed: bool) -> float:
    """GB/s that this machine reads from memory: the best of ten large sums."""
    num_bytes = STREAM_BYTES[device.type] if timed else UNTIMED_BYTES
    buffer = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(10):
        start = synchronized_timer()
        buffer.sum()
        seconds.append(synchronized_timer() - start)
    return buffer.nbytes / min(seconds) / 1e9


@pytest.fixture(scope="session")
def gemm_gflop_per_s(device: torch.device, timed: bool) -> Callable[[torch.dtype], float]:
    """dtype -> GFLOP/s of one large matrix product: the best of five."""

    @cache
    def measure(dtype: torch.dtype) -> float:
        size = GEMM_SIZE[device.type] if timed else UNTIMED_GEMM_SIZE
        x = torch.ones(size, size, device=device, dtype=dtype)
        seconds = []
        for _ in range(5):
            start = synchronized_timer()
            torch.nn.functional.linear(x, x)
            seconds.append(synchronized_timer() - start)
        return 2 * size**3 / min(seconds) / 1e9

    return measure


@pytest.fixture
def record_traffic(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that records bytes, FLOPs and their rates, by the median time.

    `percent_of_peak` is the larger of two shares: of the memory's rate and, if `gemm` (the dtype of
    a matrix product) is given, of the rate of matrix products. Small operands stay in a cache and
    exceed 100.
    """

    def record(*, num_bytes: int, num_flops: int, gemm: torch.dtype | None = None) -> None:
        benchmark.extra_info |= {"bytes": num_bytes, "flops": num_flops}
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        stream = request.getfixturevalue("stream_gb_per_s")
        shares = {"percent_of_stream": 100 * num_bytes / seconds / 1e9 / stream}
        benchmark.extra_info |= {
            "gb_per_s": num_bytes / seconds / 1e9,
            "gflop_per_s": num_flops / seconds / 1e9,
            "stream_gb_per_s": stream,
        }
        if gemm is not None:
            best = request.getfixturevalue("gemm_gflop_per_s")(gemm)
            shares["percent_of_gemm"] = 100 * num_flops / seconds / 1e9 / best
            benchmark.extra_info["gemm_gflop_per_s"] = best
        benchmark.extra_info |= {**shares, "percent_of_peak": max(shares.values())}

    return record


# A summary at the end ----------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_CELLS] = {}


@pytest.fixture
def summarize(pytestconfig: pytest.Config) -> Callable[[str, str, str, str], None]:
    """A function (table, row, column, text): its tables are printed at the end of the run."""

    def add(table: str, row: str, column: str, text: str) -> None:
        cells = pytestconfig.stash[_CELLS].setdefault(table, {})
        cells.setdefault(row, {})[column] = text

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("benchmark_disable"):
        return
    for title, rows in terminalreporter.config.stash[_CELLS].items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        widths = [max(len(c), *(len(row.get(c, "")) for row in rows.values())) for c in columns]
        first = max(map(len, rows))
        terminalreporter.section(title, sep="-")
        for name, texts in {"": {c: c for c in columns}, **rows}.items():
            cells = (texts.get(c, "").rjust(w) for c, w in zip(columns, widths, strict=True))
            terminalreporter.write_line(f"{name:<{first}}  " + "  ".join(cells))
