"""Atomic file writes, and the user cache directory."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path


def cache_directory() -> Path:
    """The project's folder in the user's cache ($XDG_CACHE_HOME or ~/.cache); it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bonsai_fast"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it into place.

    Raises:
        OSError: the content could not be written; `path` is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Raise OSError if the disk of a folder, which need not exist, has less room than that."""
    free = shutil.disk_usage(existing_folder(folder)).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {num_bytes / 1e9:.2f} GB on the disk of {folder}, "
            f"{free / 1e9:.2f} GB are free; choose an output on another disk",
        )
