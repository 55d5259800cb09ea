"""The name of this machine in bench/results: its GPU or CPU, not its host name."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch


def machine_name(device: torch.device | None = None) -> str:
    """Such as NVIDIA-A100-SXM4-80GB or AMD-EPYC-2-cores.

    Args:
        device: the device that is measured; None: a GPU if there is one.
    """
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{_processor()} {_cores()} cores"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    print(machine_name())
