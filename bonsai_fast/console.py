"""What commands show: progress, notes, tables, one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers.utils import logging

Advance = Callable[[int], None]


class Reporter:
    """Writes to stderr with rich; `Reporter(quiet=True)` writes nothing.

    Attributes:
        warnings: every warning so far, oldest first.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.warnings: list[str] = []
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def note(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line, marked as a warning."""
        self.warnings.append(text)
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        self.console.print(table)

    def busy(self, text: str) -> AbstractContextManager[object]:
        """Show a spinner with this text inside the context; it is erased afterwards."""
        return self.console.status(text)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Advance]:
        """A progress bar; yields the function that advances it."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(description, total=total)
            yield lambda count: progress.advance(task, count)

    @contextmanager
    def training_bar(self, description: str) -> Iterator[Callable[[float, str], None]]:
        """A progress bar of work whose end is not a count.

        Yields the function that is told the share that is done, in [0, 1], and the state in words.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[state]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(description, total=1.0, state="")
            yield lambda share, state: progress.update(task, completed=share, state=state)


# exit codes
WRONG_RESULT = 1
USAGE_ERROR = 2
INTERRUPTED = 130


def silence_transformers() -> None:
    """Turn off the notes and progress bars of transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def fail(error: Exception, code: int = USAGE_ERROR) -> int:
    """Print an error in one line; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
