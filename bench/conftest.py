"""Benchmark environment: the machine in every record, traffic as a share of what its memory can do.

`pytest bench` times everything; `pytest bench --benchmark-disable -k smoke` runs every benchmark
once on a small shape, untimed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from importlib import metadata

import pytest
import torch

from bonsai_fast.testing import synchronized_timer

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

PACKAGES = ("torch", "triton", "transformers", "numpy")
# Larger than any last-level cache.
STREAM_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add what pytest-benchmark leaves out: it records the CPU and the commit itself."""
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = {name: _version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        machine_info["driver"] = subprocess.check_output(query, text=True).strip()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def repeats(device: torch.device) -> dict[str, int]:
    """Arguments of `benchmark.pedantic`; iterations amortise the synchronisation of a GPU."""
    if device.type == "cuda":
        return {"rounds": 20, "iterations": 10, "warmup_rounds": 3}
    return {"rounds": 10, "iterations": 1, "warmup_rounds": 2}


@pytest.fixture(scope="session")
def stream_gb_per_s(device: torch.device) -> float:
    """What this machine reads from memory in one long stream: the best of ten large sums."""
    buffer = torch.ones(STREAM_BYTES[device.type] // 4, device=device)
    seconds = []
    for _ in range(10):
        start = synchronized_timer()
        buffer.sum()
        seconds.append(synchronized_timer() - start)
    return buffer.nbytes / min(seconds) / 1e9


@pytest.fixture
def record_traffic(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that puts bytes, FLOPs and their rates, by the median, beside the timing."""

    def record(*, num_bytes: int, num_flops: int) -> None:
        benchmark.extra_info |= {"bytes": num_bytes, "flops": num_flops}
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        stream = request.getfixturevalue("stream_gb_per_s")
        benchmark.extra_info |= {
            "gb_per_s": num_bytes / seconds / 1e9,
            "gflop_per_s": num_flops / seconds / 1e9,
            "stream_gb_per_s": stream,
            "percent_of_stream": 100 * num_bytes / seconds / 1e9 / stream,
        }

    return record
