"""A full disk, as the code that writes weights sees it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def small_files() -> Iterator[None]:
    """Inside, no file may grow beyond 8 KiB.

    Around the writing alone, never as a fixture: pytest reports a test before it tears fixtures
    down, and what it reports to may be a file that is longer already.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
