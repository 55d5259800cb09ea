"""Peak memory of a block of code, beyond what was in use before."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# written to clear_refs, it resets the peak of resident memory
_FORGET_PEAK = "5"


class PeakMemory:
    """Measures the peak memory of a `with` block.

        with PeakMemory(model.device) as peak: ...
        peak.bytes

    On CUDA this is PyTorch's allocated memory, elsewhere the process's resident memory, as Linux
    counts it. At the start glibc is asked to return freed memory to the system. Other allocators
    may keep it; a block that reuses such memory is measured too low.

    Attributes:
        bytes: peak inside the block minus the level at its start; None inside the block, and on
            systems where it cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes: int | None = None
        self._device = device
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            _give_back_freed()
            self._start = _resident("VmRSS") if _forget_peak() else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._start is None:
            return
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _resident("VmHWM") or 0
        self.bytes = max(0, peak - self._start)


def _give_back_freed() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text(_FORGET_PEAK)
    except OSError:
        return False
    return _resident("VmHWM") is not None


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
