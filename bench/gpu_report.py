"""Results of gpu.py: printed and written to disk one by one."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from machine import machine_name

from bonsai_fast.files import write_json

PACKAGES = ("torch", "triton", "transformers", "numpy")


class OutOfTimeError(Exception):
    """No time left: the rest of a section is left out."""


class Report:
    """Rows of all sections.

    Args:
        path: JSON file, rewritten after every row.
        minutes: time limit of the whole run.
        device: the device that is measured.
        options: of the command line.
    """

    def __init__(
        self, path: Path, minutes: float, device: torch.device, options: dict[str, Any]
    ) -> None:
        self._path, self._deadline = path, time.monotonic() + 60 * minutes
        self._content: dict[str, Any] = {
            "machine": machine(device),
            "options": options,
            "sections": {},
            "failures": {},
            "out_of_time": {},
            "finished": False,
        }

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def failures(self) -> dict[str, str]:
        """Error messages, by section."""
        return dict(self._content["failures"])

    def begin(self, section: str, title: str) -> None:
        """Start a section."""
        self._content["sections"][section] = []
        print(f"\n{title}", flush=True)

    def need(self, seconds: float, what: str) -> None:
        """Raise OutOfTimeError unless this much time is left.

        Args:
            seconds: that the next case needs.
            what: the next case, for the message.
        """
        if self.seconds_left < seconds:
            raise OutOfTimeError(what)

    def add(self, section: str, text: str, **row: Any) -> None:
        """One result: a line for people, values for the file."""
        self._content["sections"][section].append(row)
        print(f"  {text}", flush=True)
        self.save()

    @contextmanager
    def case(self, section: str) -> Iterator[None]:
        """Around one case of a section: if it fails, the other cases still run."""
        try:
            yield
        except OutOfTimeError:
            raise
        except Exception as error:  # whatever it is
            traceback.print_exc()
            self.fail(section, error)

    def fail(self, section: str, error: BaseException) -> None:
        """Record a failure; earlier results stay."""
        lines = str(error).strip().splitlines() or [""]
        message = f"{type(error).__name__}: {lines[0]}"
        earlier = self._content["failures"].get(section)
        self._content["failures"][section] = f"{earlier}; {message}" if earlier else message
        print(f"  FAILED: {message}", flush=True)
        self.save()

    def cut(self, section: str, error: OutOfTimeError) -> None:
        """Record that a section was not finished in time."""
        self._content["out_of_time"][section] = f"from {error} on"
        print(f"  no time left, from {error} on", flush=True)
        self.save()

    def finish(self) -> None:
        """Record that all sections have run."""
        self._content["finished"] = True
        self.save()

    def save(self) -> None:
        """Write all results so far."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._content)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions that the numbers depend on."""
    found: dict[str, Any] = {
        "name": machine_name(device),
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
