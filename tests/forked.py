"""Commands in processes of their own that need not import the package again.

A server imports it once; each command runs in a fork of the server. For the command this is a new
process: nothing was computed in it, and it can be killed. Starting Python takes 5 s each time,
so that only tests of a fresh start use `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["bonsai_fast", "transformers.models.llama.modeling_llama"])


@dataclass(frozen=True)
class Command:
    """A started command.

    Attributes:
        process: where it runs.
        logs: the files that its stdout and stderr are written to.
    """

    process: BaseProcess
    logs: tuple[Path, Path]

    @property
    def runs(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self.process.kill()
        self.process.join()

    def wait(self) -> tuple[int, str, str]:
        """Exit code (negative: the signal that ended it), stdout and stderr."""
        self.process.join()
        assert self.process.exitcode is not None
        out, err = (log.read_text() for log in self.logs)
        return self.process.exitcode, out, err


def nothing() -> None:
    """What happens before a command by default."""


def start(
    module: str, *arguments: object, folder: Path, before: Callable[[], None] = nothing
) -> Command:
    """Start `python -m module arguments` in a folder, where its logs are written, too.

    Args:
        before: a function of a module, called in the new process before the command.
    """
    logs = folder / "stdout.log", folder / "stderr.log"
    words = [module, *map(str, arguments)]
    process = _CONTEXT.Process(target=_run, args=(words, folder, logs, before))
    process.start()
    return Command(process, logs)


def call(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a function of a module in a process of its own."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def _run(
    words: list[str], folder: Path, logs: tuple[Path, Path], before: Callable[[], None]
) -> None:
    for number, log in enumerate(logs, start=1):
        with open(log, "wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    sys.argv = words
    before()
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
